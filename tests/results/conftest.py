"""The study's own modules, which are run as scripts, importable by their names."""

import sys
from pathlib import Path

MINI = Path(__file__).parents[2] / "results" / "mini"
sys.path.insert(0, str(MINI))
collect_ignore_glob = [] if (MINI / "claims.py").exists() else ["test_*.py"]  # the protocol is not here yet
