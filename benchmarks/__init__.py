"""Measurements of the product path beside the plain implementation and an outside peer: ``python -m benchmarks``."""


# The plain implementation is the tests' oracle; it is not installed.
