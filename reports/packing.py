"""A report to hand on: a suite's pages with their figures and data as one HTML file, or all files as one zip."""

import base64
import re
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from experiments.store.files import write_text
from reports.mask_pictures import deflate
from reports.pages import script_hash
from reports.render import TEMPLATES

_TEXTS = (".html", ".md", ".tex", ".csv", ".json", ".svg")
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def single_files(written: Sequence[Path], base: Path) -> list[Path]:
    """One page beside the folder of each suite of a report in ``base``: its pages, explorer, figures and tables.

    Links between the pages work inside it, links to files save them. Nothing is fetched.
    """
    folders = sorted({base / path.relative_to(base).parts[0] for path in written if path.parent != base})
    found = [(folder, [path for path in written if folder in path.parents]) for folder in folders]
    return [_single(folder, paths) for folder, paths in found if folder / "index.html" in paths]


def _single(folder: Path, paths: Sequence[Path]) -> Path:
    texts = {_name(path, folder): path.read_text() for path in paths if path.suffix in _TEXTS}
    others = {
        _name(path, folder): base64.b64encode(path.read_bytes()).decode() for path in paths if path.suffix not in _TEXTS
    }
    pages = [text for name, text in texts.items() if name.endswith(".html")]
    hashes = dict.fromkeys(script_hash(script) for page in pages for script in _SCRIPT.findall(page))
    shell = (TEMPLATES / "single.js").read_text()
    page = (
        _environment()
        .get_template("single.html.j2")
        .render(
            name=folder.name,
            script=Markup(shell),
            hashes=[script_hash(shell), *hashes],
            packed=deflate({"texts": texts, "others": others}),
        )
    )
    out = folder.with_name(f"{folder.name}.html")
    write_text(out, page, durable=False)
    return out


def zipped(written: Sequence[Path], base: Path) -> Path:
    """All files of a report as ``report.zip`` in ``base``; the same report gives the same bytes."""
    out = base / "report.zip"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(set(written)):
            entry = zipfile.ZipInfo(f"report/{_name(path, base)}")
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    return out


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True
    )
