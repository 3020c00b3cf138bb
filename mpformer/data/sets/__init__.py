"""The datasets that the project knows: a module each, with its ``SOURCE``; the registry finds them by name."""
