"""Commands on runs that have been executed: import, prune, evaluate again, compare, visualize, cancel."""
