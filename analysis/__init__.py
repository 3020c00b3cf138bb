"""Numbers and pictures from decoder layers; this module imports no torch."""
