"""Measurements of the product path beside the plain implementation and an outside peer: ``python -m benchmarks``."""

import sys
from pathlib import Path

# The plain implementation is the tests' oracle; it is not installed.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
