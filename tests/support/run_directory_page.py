"""The files that docs/run_directory.md knows, to be compared with those that a store has."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "run_directory.md").read_text()


def patterns() -> list[str]:
    """Every path of the page's headings and of its table of other files, as a regular expression."""
    headings = re.findall(r"^## `([^`]+)`", PAGE, re.MULTILINE)
    rows = re.findall(r"^\| (`[^|]*[/.][^|]*`) \| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
    paths = [path for cell in rows for path in re.findall(r"`([^`]+)`", cell)]
    return [_pattern(path) for heading in headings for path in heading.split("; ")] + [_pattern(path) for path in paths]


def _pattern(path: str) -> str:
    """``<name>`` stands for anything without a slash, ``[…]`` may be missing, a folder for all that lies in it."""
    words = re.escape(path.partition(", ")[0])
    words = re.sub(r"\\\[(.*?)\\\]", r"(?:\1)?", words)
    return re.sub(r"<.*?>", "[^/]+", words) + (".*" if path.endswith("/") else "")


def unknown_files(store: Path) -> list[str]:
    """Return the files of a store that the page does not name, but for those that a killed process was writing."""
    known = re.compile("|".join(f"(?:{pattern})" for pattern in patterns()))
    names = (path.relative_to(store).as_posix() for path in sorted(store.rglob("*")) if path.is_file())
    torn = re.compile(r"(?:.*/)?\.[^/]+\.\d+\.[0-9a-f]{8}")
    return [name for name in names if not known.fullmatch(name) and not torn.fullmatch(name)]
