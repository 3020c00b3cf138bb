"""A set of the user's own: reading an export, looking it through, registering it, writing what training reads."""
