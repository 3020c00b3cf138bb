"""Whether a suite's report would come out as it is: from the size and time of every file that it is made of.

What is said of a run without a result also depends on the time of day (a heartbeat grows old without any file
changing) and on what Slurm said last: its state is a part of the digest.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

import analysis
from experiments.status import usage
from experiments.status.scheduler import NOWHERE, Placement
from experiments.status.states import derive
from experiments.store.files import read_json, write_json
from experiments.store.run_dir import RESULT, RUN, RunDir, Store
from experiments.store.suite_record import SuiteRecord

_LEFT_OUT = {"checkpoints", "claims", "__pycache__"}
_WITH_A_RESULT = {"layer_masks", "further_masks"}
"""Folders of many files that are written just before a result: the folder's own time is looked at, not each file's."""
_RECORD = ".report.json"


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what a suite's report is made of, and of what the page of each run is, by run and evaluation."""

    whole: str
    pages: Mapping[tuple[str, str], str]


def fingerprint(
    record: SuiteRecord,
    store: Store,
    options: Sequence[object],
    queued: frozenset[str] = frozenset(),
    placements: Mapping[str, Placement] = NOWHERE,
) -> Fingerprint:
    """Of a suite's record, the files and states of its runs, the code of the reports, and how they are asked for."""
    runs = sorted({(run.run_id, run.eval_id) for _, run in record.runs()})
    folders = {name: store.run(name) for name, _ in runs}
    files = {name: _files(run.path) or _file(run.archive) for name, run in folders.items()}
    configurations = [_file(run.path / RUN) for run in folders.values()]  # a run's page compares its own with others
    code = [_files(Path(str(module)).parent) for module in (__file__, analysis.__file__)]
    shared = digest(record, list(options), configurations, code)
    accounted = usage.of_launches(store)
    pages = {
        (name, eval_id): digest(
            shared, files[name], accounted.get(name), _state(folders[name], eval_id, queued, placements)
        )
        for name, eval_id in runs
    }
    return Fingerprint(digest(shared, pages), pages)


def digest(*parts: object) -> str:
    """A digest of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _state(run: RunDir, eval_id: str, queued: frozenset[str], placements: Mapping[str, Placement]) -> str:
    """What is said of a run that has no result yet; empty for one that has, which files alone decide."""
    if (run.evaluation(eval_id) / RESULT).exists() or not run.path.exists():
        return run.run_id if run.run_id in queued else ""
    found = derive(run, eval_id, queued, placements)
    return f"{found.label} {found.detail}"


def _files(folder: Path) -> list[tuple[str, int, int]]:
    return sorted(_walk(str(folder)))


def _file(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_mtime_ns, path.stat().st_size
    except OSError:
        return None


def _walk(folder: str) -> Iterator[tuple[str, int, int]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir() and entry.name not in _WITH_A_RESULT:
            if entry.name not in _LEFT_OUT:
                yield from _walk(entry.path)
        else:
            try:
                status = entry.stat()
            except OSError:  # a link to nowhere, or a file that is gone by now
                status = entry.stat(follow_symlinks=False) if entry.is_symlink() else os.stat(folder)
            yield entry.path, status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class Made:
    """A suite's report: its files, and its card on the overview."""

    files: tuple[Path, ...]
    card: Markup
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of what some files were made, by name: a suite that changed leaves those alone that did not."""


def kept(folder: Path, whole: str) -> Made | None:
    """The report in ``folder`` if it is of this fingerprint and complete, else None."""
    content = read_json(folder / _RECORD)
    if not isinstance(content, dict) or content.get("fingerprint") != whole:
        return None
    files = tuple(folder / name for name in content["files"])
    return Made(files, Markup(content["card"])) if all(path.exists() for path in files) else None


def digests(folder: Path) -> dict[str, str]:
    """What the files of the report in ``folder`` were made of, by name; empty if it is not complete."""
    content = read_json(folder / _RECORD)
    return dict(content.get("digests", {})) if isinstance(content, dict) else {}


def remember(folder: Path, whole: str, made: Made) -> None:
    """Note what a suite's report was made of."""
    names = [str(path.relative_to(folder)) for path in made.files]
    content = {"fingerprint": whole, "files": names, "card": str(made.card), "digests": dict(made.digests)}
    write_json(folder / _RECORD, content)


def forget(folder: Path) -> None:
    """Say nothing of the report in ``folder``: it is about to be rewritten."""
    (folder / _RECORD).unlink(missing_ok=True)
