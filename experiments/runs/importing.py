"""Runs from another store: checked, copied whole, and never over anything that is here.

A run comes over if its id is the id of its configuration and its weights and results are sound. It is copied beside its
place and renamed, results and all; a run that is here already, planned and untouched, is filled in under a claim. An
archived run stays an archive; of weights that it was made without, its manifest has to name the checksum.
"""

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path

from experiments.status import usage
from experiments.store import archive, claims
from experiments.store.files import replacing
from experiments.store.identity import SCHEME, run_id
from experiments.store.records import RecordError
from experiments.store.run_dir import RESULT, RUN, TRAINED, RunDir, Store
from mpformer.runtime.disk import DISK, FULL, sha256
from mpformer.runtime.errors import UserError

LAST = (TRAINED, RESULT)
"""Files that say that something is complete; they are copied after everything else."""


@dataclass(frozen=True)
class Handled:
    """What became of one run: ``imported``, ``archived`` …, ``kept`` or ``refused``, and why."""

    run_id: str
    what: str
    reason: str = ""


def import_runs(store: Store, other: Store, dry_run: bool = False) -> list[Handled]:
    """Copy the sound runs of another store that are not here; raises UserError if there is no other store."""
    if not (other.root / "runs").is_dir():
        raise UserError(f"{other.root} is not a run store: it has no directory runs/")
    if other.root.resolve() == store.root.resolve():
        raise UserError(f"{other.root} is this store itself; give another one")
    return [_import(store, run, dry_run) for run in other.runs()]


def _import(store: Store, run: RunDir, dry_run: bool) -> Handled:
    try:
        with run.whole() as whole:
            return _taken_over(store, whole, dry_run)
    except RecordError as error:
        return Handled(run.run_id, "refused", str(error))


def _taken_over(store: Store, run: RunDir, dry_run: bool) -> Handled:
    problem = check(run)
    if problem:
        return Handled(run.run_id, "refused", problem)
    ours = store.run(run.run_id)
    if _touched(ours):
        return Handled(run.run_id, "kept", "it is here already, with results or attempts of its own")
    if claims.holder(run.path / "claims") is not None:
        return Handled(run.run_id, "refused", "something works on it there")
    if dry_run:
        return Handled(run.run_id, "would import")
    if run.original is not None and not usage.accounted(run):  # of which only a directory can take a record along
        return _take_archive(ours, run)
    if ours.path.exists():
        return _fill_in(ours, run)
    try:
        with replacing(ours.path) as aside:
            _copy(run, aside)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return _fill_in(ours, run)  # planned here a moment ago
    return Handled(run.run_id, "imported")


def check(run: RunDir) -> str:
    """Say why a run cannot be taken over; empty if it can: its identity, its weights and its results are sound."""
    try:
        record, config = run.record(), run.config()
    except UserError as error:
        return str(error)
    if record.scheme != SCHEME:
        return f"it is of identity scheme {record.scheme}, this is {SCHEME}"
    if run_id(config) != run.run_id or record.run_id != run.run_id:
        return f"its configuration is that of {run_id(config)}"
    void = run.void()
    if void is not None:
        return f"it is void: {void.reason}"
    trained = run.trained()
    if trained is None:
        return "it is not trained to the end"
    if _weights_sha256(run, trained.weights) != trained.weights_sha256:
        return "its weights are missing or do not match their checksum"
    for name in run.evaluations():
        if (run.evaluation(name) / RESULT).exists() and run.result(name) is None:
            return f"its result {name} is damaged"
    return ""


def _weights_sha256(run: RunDir, name: str) -> str:
    """Checksum of its final weights, or what its archive says of those that it was made without; empty: missing."""
    if (run.path / name).is_file():
        return sha256(run.path / name)
    left_out = archive.manifest(run.archive).left_out if run.original is not None else {}
    return left_out[name].sha256 if name in left_out else ""


def _take_archive(ours: RunDir, run: RunDir) -> Handled:
    """Copy its archive; what was planned of it here, and nothing else, goes, under a claim."""
    planned = ours.path.exists()
    claim = claims.acquire(ours.claims) if planned else None
    if planned and claim is None:
        return Handled(run.run_id, "kept", "something works on it here")
    try:
        archive.copy(run.archive, ours.archive)
        if planned:
            archive.remove(ours.path)
    except OSError as error:
        if claim is not None:
            claim.release()
        raise _unwritable(ours.archive, error) from None
    return Handled(run.run_id, "imported")


def _touched(run: RunDir) -> bool:
    """Whether anything but a plan is here."""
    if run.packed:
        return True
    names = {path.name for path in run.path.iterdir()} if run.path.exists() else set()
    return bool(names - {RUN, "claims", "reservations"}) or bool(claims.highest(run.path / "claims"))


def _fill_in(ours: RunDir, run: RunDir) -> Handled:
    """Fill a planned run in under a claim; attempts keep their numbers, so those of their claims are used up too."""
    claim = claims.acquire(ours.path / "claims")
    if claim is None or claim.number != 1:
        return Handled(run.run_id, "kept", "something works on it here")
    try:
        _copy(run, ours.path, skip=(RUN, "claims", "reservations"))
        for number in range(claim.number + 1, claims.highest(run.path / "claims") + 1):
            claims.create(ours.path / "claims" / f"{number}.released", "")
            claims.create(ours.path / "claims" / str(number), "")
    finally:
        claim.release()
    return Handled(run.run_id, "imported")


def _copy(run: RunDir, target: Path, skip: tuple[str, ...] = ("reservations",)) -> None:
    """Copy files that are not there, those last that say that something is complete."""
    source = run.path
    usage.keep(run, target)
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    for name in sorted(files, key=lambda name: LAST.index(name.name) + 1 if name.name in LAST else 0):
        if name.parts[0] in skip:
            continue
        path, file = source / name, target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _copied(path, file)


def _copied(path: Path, file: Path) -> None:
    try:
        shutil.copy2(path, file)
    except OSError as error:  # which names the file that was read
        raise _unwritable(file, error) from None


def _unwritable(file: Path, error: OSError) -> Exception:
    """What to say of a file that cannot be written; the error itself where the disk is not to blame."""
    if error.errno not in DISK:
        return error
    advice = "free some space there" if error.errno in FULL else "choose another --root"
    return UserError(f"cannot write {file}: {error.strerror}; {advice} and import again: what was imported is whole")
