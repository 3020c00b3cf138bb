"""The run store: plain files under one root, written atomically, never deleted by another command's success.

``<root>/suites`` says which runs a launch resolved to, ``<root>/runs/<run_id>`` holds a run, ``<root>/launches`` what
was started. Nothing here imports torch, and reading never writes.
"""

import contextlib
import functools
import hashlib
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.store import archive, records
from experiments.store.archive import Keeping
from experiments.store.attempt_dir import AttemptDir
from experiments.store.files import is_finite, json_lines, names_in, write_text
from experiments.store.records import R, Record, RecordError
from experiments.store.suite_record import SuiteRecord
from mpformer.runtime.disk import sha256
from mpformer.runtime.errors import UserError

if TYPE_CHECKING:
    from mpformer.config.schema import Config

RUN, TRAINED, RESULT = "run.json", "trained.json", "result.json"
"""Files that say what a run is, that it is trained, that an evaluation is complete; the latter two are written last."""

LIGHT_HINT = "use the store that it was archived from, or train it again: mpformer prune RUN --yes, then launch"
"""What to do where something is needed that a light archive does not have."""

_RESULTS = (TRAINED, "checkpoints", "metrics.jsonl", "probes.parquet", "evals", "void.json")
"""What a run leaves by being executed, but for its attempts and claims."""


@dataclass(frozen=True)
class RunRecord(Record):
    """``run.json``: what a run is. Written once, before anything else of it."""

    remedy: ClassVar[str] = "launch its suite again to rewrite it"

    config: Mapping[str, Any]
    run_id: str = ""
    scheme: int = 1
    """Version of the rules that made its id (:mod:`experiments.store.identity`)."""
    seed: int | None = None
    toggles: Mapping[str, Any] = field(default_factory=dict)
    row: str = ""
    """The row of the suite that it was first planned for."""
    created: float = 0.0


@dataclass(frozen=True)
class Trained(Record):
    """``trained.json``: the train stage is complete; written after the final weights."""

    weights_sha256: str
    weights: str = ""
    """Path of the final weights in the run's directory."""
    iterations: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    world_size: int | None = None
    device: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the trainer says (:func:`mpformer.training.trainer.train`)."""


@dataclass(frozen=True)
class Result(Record):
    """``result.json``: the scores of one evaluation setting; written last of everything, complete and finite."""

    run_id: str = ""
    eval_id: str = ""
    attempt: int | None = None
    complete: bool = False
    iteration: int | None = None
    images: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the evaluation says (:func:`mpformer.evaluation.evaluate.evaluate`)."""

    def valid(self, run_id: str, eval_id: str) -> bool:
        """Whether it is of this run and setting, complete, and finite throughout."""
        if not self.complete or (self.run_id, self.eval_id) != (run_id, eval_id):
            return False
        return bool(self.metrics) and all(map(is_finite, (self.seconds, self.metrics, self.layers, self.more)))


@dataclass(frozen=True)
class Void(Record):
    """``void.json``: a user declared the run's results void."""

    reason: str = ""
    time: float = 0.0


@dataclass(frozen=True)
class Setting(Record):
    """``setting.json``: with which settings an evaluation is made."""

    evaluation: Mapping[str, Any] = field(default_factory=dict)
    """The section of the configuration."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """The section's keys, in a file of an earlier version."""


@dataclass(frozen=True)
class Mark(Record):
    """That something happened: ``cancel.json``, a user asked for the run to be stopped; ``tasks/<name>.json``, the main
    task of one start of a Slurm job has ended."""

    time: float = 0.0


@dataclass(frozen=True)
class RunDir:
    """One run's directory."""

    path: Path
    original: Path | None = None
    """Its directory in the store, where ``path`` is a copy that was unpacked for reading."""

    @property
    def root(self) -> Path:
        """Root of the store that it is in."""
        return (self.original or self.path).parents[1]

    @property
    def archive(self) -> Path:
        """The file that it is packed into, if it is (:mod:`experiments.store.archive`)."""
        return (self.original or self.path).with_name(f"{self.run_id}{archive.SUFFIX}")

    @property
    def packed(self) -> bool:
        """Whether it is an archive alone."""
        return not self.path.exists() and self.archive.exists()

    def pack(self, without: Collection[Path] = (), keeping: Keeping = Keeping.WHOLE) -> None:
        """Put its files but for these into an archive in its place; raises OSError, leaving the directory as it was."""
        archive.write(self.path, self.archive, without, keeping)
        archive.remove(self.path)

    def unpack(self) -> None:
        """Put a directory in the place of its archive, if it is packed.

        Raises RecordError for a damaged archive, UserError for one of a trained run that lacks its weights.
        """
        if self.packed:
            if self.trained() is not None and self.was_archived_without(archive.WEIGHTS):
                raise UserError(f"{self.run_id} was archived without its weights and stays an archive; {LIGHT_HINT}")
            archive.unpack(self.archive, self.path)
            self.archive.unlink(missing_ok=True)

    def was_archived_without(self, part: str) -> bool:
        """Whether it is an archive, or a copy of one, made without a file or folder of this name."""
        packed = self.packed or self.original is not None
        return packed and archive.manifest(self.archive).without(part)

    @contextlib.contextmanager
    def whole(self) -> Iterator["RunDir"]:
        """Give it with every file that there is: a copy for the while, if it is packed; raises RecordError."""
        if not self.packed:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="mpformer.") as folder:
            archive.unpack(self.archive, Path(folder, self.run_id))
            yield RunDir(Path(folder, self.run_id), self.path)

    def _sound(self, kind: type[R], file: Path) -> R | None:
        """A record out of its directory, or else out of its archive; None if it is missing or damaged."""
        found = records.load_sound(kind, file)
        return found if found is not None or self.path.exists() else self._packed_record(kind, file)

    def _packed_record(self, kind: type[R], file: Path) -> R | None:
        name = file.relative_to(self.path).as_posix()
        content = archive.read(self.archive, name)
        return None if content is None else records.decode(kind, content, f"{self.archive}: {name}")

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def metrics(self) -> Path:
        """The file that MLflow mirrors."""
        return self.path / "metrics.jsonl"

    def scored(self) -> tuple[dict[str, Any], ...]:
        """Return the evaluation lines of its metrics, oldest first."""
        return json_lines(self.metrics, holding=b'"evaluation"')

    @property
    def void_file(self) -> Path:
        """Present when a user declared the run's results void."""
        return self.path / "void.json"

    @property
    def cancel_file(self) -> Path:
        """Present when a user asked for the run to be stopped."""
        return self.path / "cancel.json"

    def exists(self) -> bool:
        """Whether the run has been planned into the store."""
        return self._file.exists() or self.archive.exists()

    def create(self, config: "Config", row: str) -> None:
        """Write ``run.json`` unless it is there, sound: it is immutable."""
        from experiments.store.identity import SCHEME

        if self.sound_record() is not None:
            return
        toggles, tree = config.toggles.model_dump(mode="json"), config.model_dump(mode="json")
        record = RunRecord(tree, self.run_id, SCHEME, config.seed, toggles, row, time.time())
        records.save(self._file, record)

    @property
    def _file(self) -> Path:
        return self.path / RUN

    def record(self) -> RunRecord:
        """Return what the run is; raises RecordError if that is missing or damaged."""
        record = records.load(RunRecord, self._file) or self._packed_record(RunRecord, self._file)
        if record is None:
            raise RecordError(f"{self._file} is missing: {RunRecord.remedy}")
        return record

    def sound_record(self) -> RunRecord | None:
        """The same, None if it is missing or damaged; raises RecordError for a newer one."""
        return self._sound(RunRecord, self._file)

    def config(self) -> "Config":
        """Return the run's full configuration."""
        from mpformer.config.schema import validate  # pydantic, which those who only look at states do without

        return validate(dict(self.record().config))

    def attempt(self, number: int) -> AttemptDir:
        """Return the directory of one attempt."""
        return AttemptDir(self.path / "attempts" / str(number))

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts so far, ascending."""
        return sorted(int(name) for name in names_in(self.path / "attempts") if name.isdigit())

    def last_attempt(self) -> AttemptDir | None:
        """Return the directory of the last attempt, None if there was none."""
        number = max(self.attempts(), default=0)
        return self.attempt(number) if number else None

    @property
    def claims(self) -> Path:
        """Who may work on it (:mod:`experiments.store.claims`)."""
        return self.path / "claims"

    def end_task(self, name: str) -> None:
        """Say to the other tasks of a start of a Slurm job, by its name, that the main one has ended."""
        records.save(self._task(name), Mark(time.time()))

    def task_ended(self, name: str) -> bool:
        """Whether the main task of that start has ended."""
        return self._task(name).exists()

    def _task(self, name: str) -> Path:
        return self.path / "tasks" / f"{name}.json"

    def trained(self) -> Trained | None:
        """Return how it was trained, if the train stage is complete."""
        trained = self._sound(Trained, self.trained_file)
        return trained if trained is not None and trained.weights_sha256 else None

    @property
    def trained_file(self) -> Path:
        """Present when the train stage is complete."""
        return self.path / TRAINED

    def weights(self) -> Path | None:
        """Return the final weights, if it is trained and they are there and match their checksum."""
        trained = self.trained()
        if trained is None:
            return None
        path = self.path / trained.weights
        return path if path.is_file() and sha256(path) == trained.weights_sha256 else None

    def write_trained(self, content: Mapping[str, Any]) -> Trained:
        """Write that the train stage is complete, as the trainer says it; returns the record."""
        trained = records.decode(Trained, content, str(self.trained_file))
        records.save(self.trained_file, trained)
        return trained

    def evaluation(self, eval_id: str) -> Path:
        """Return the directory of one evaluation setting."""
        return self.path / "evals" / eval_id

    def evaluations(self) -> list[str]:
        """Return the ids of the evaluation settings that have a directory, in order."""
        return sorted(names_in(self.path / "evals"))

    def write_setting(self, folder: Path, setting: Mapping[str, Any]) -> None:
        """Write the evaluation setting as configuration into an evaluation's directory."""
        records.save(folder / "setting.json", Setting(setting))

    def setting(self, folder: Path) -> dict[str, Any] | None:
        """Return the evaluation setting of an evaluation's directory; None if it has none, or a damaged one."""
        found = records.load_sound(Setting, folder / "setting.json")
        return None if found is None else dict(found.evaluation or found.more)

    def newest_evaluation(self) -> Path | None:
        """Return the directory of the newest complete evaluation; None if there is none."""
        done = [self.evaluation(name) for name in self.evaluations() if self.result(name) is not None]
        return max(done, key=lambda folder: (folder / RESULT).stat().st_mtime, default=None)

    def progress_mark(self) -> str:
        """Return a text that changes whenever something of it is completed: a checkpoint, the training, a result."""
        files = [*self.path.glob("checkpoints/[!.]*"), self.trained_file, *self.path.glob(f"evals/*/{RESULT}")]
        marks = []
        for file in files:
            with contextlib.suppress(OSError):
                marks.append((file.stat().st_mtime_ns, file.name))
        return "{} {}".format(*max(marks)) if marks else ""

    def set_aside(self) -> None:
        """Move what a void run left into ``voided/<n>``, so that it can be done again; nothing is deleted."""
        aside = self.path / "voided" / str(1 + len(names_in(self.path / "voided")))
        aside.mkdir(parents=True)
        for name in _RESULTS:
            if (self.path / name).exists():
                shutil.move(self.path / name, aside / name)

    def result(self, eval_id: str) -> Result | None:
        """Return the result if it is valid, complete and finite: the run is then DONE for this setting."""
        result = self._sound(Result, self.evaluation(eval_id) / RESULT)
        return result if result is not None and result.valid(self.run_id, eval_id) else None

    def write_result(self, result: Result, folder: Path | None = None) -> None:
        """Write the result of one evaluation setting, after everything else of it; ``folder``: not yet in its place."""
        records.save((folder or self.evaluation(result.eval_id)) / RESULT, result)

    def void(self) -> Void | None:
        """Return why its results are void; None if they are not."""
        return (records.load_sound(Void, self.void_file) or Void()) if self.void_file.exists() else None

    def declare_void(self, reason: str) -> None:
        """Declare its results void."""
        records.save(self.void_file, Void(reason, time.time()))

    def ask_to_cancel(self) -> None:
        """Ask whoever works on it to checkpoint and stop."""
        records.save(self.cancel_file, Mark(time.time()))


@functools.cache
def _copy(packed: Path) -> RunDir:
    """An archive's copy for this process, without checkpoints; it goes with the process."""
    if not _COPIES:
        _COPIES.append(tempfile.TemporaryDirectory(prefix="mpformer."))
    original = packed.with_name(packed.name.removesuffix(archive.SUFFIX))
    copy = Path(_COPIES[0].name, hashlib.sha256(str(packed.absolute()).encode()).hexdigest()[:8], original.name)
    copy.parent.mkdir()
    archive.unpack(packed, copy, without=("checkpoints",))
    return RunDir(copy, original)


_COPIES: list[tempfile.TemporaryDirectory[str]] = []
"""Where copies are, once there is one."""


@dataclass(frozen=True)
class Store:
    """A store of runs under ``root``."""

    root: Path

    def run(self, run_id: str) -> RunDir:
        """Return a run's directory, whether or not it exists."""
        return RunDir(self.root / "runs" / run_id)

    def runs(self) -> Iterator[RunDir]:
        """Yield every run, packed ones too, in the order of names."""
        return map(self.run, self._names())

    def _names(self) -> list[str]:
        return sorted({name.removesuffix(archive.SUFFIX) for name in names_in(self.root / "runs")})

    def reading(self, run_id: str) -> RunDir:
        """Return a run to read every file of but checkpoints; a packed one is unpacked for this process alone.

        One whose archive is damaged is returned as it is: its records then say so.
        """
        run = self.run(run_id)
        with contextlib.suppress(RecordError):
            return _copy(run.archive) if run.packed else run
        return run

    def find(self, text: str) -> RunDir:
        """Return the one run whose id is, ends with or starts with ``text``; raises UserError with the candidates."""
        names = self._names()
        found = [n for n in names if n == text] or [n for n in names if n.endswith(text) or n.startswith(text)]
        if len(found) == 1:
            return self.run(found[0])
        shown = ", ".join((found or names)[:8]) or "none yet: launch a suite"
        raise UserError(f"{'ambiguous' if found else 'unknown'} run {text!r}; runs: {shown}")

    @property
    def launches(self) -> Path:
        """Directory of what was started."""
        return self.root / "launches"

    def suite_path(self, name: str) -> Path:
        """Return the path of a suite's record by the suite's name, such as ``headline@mini``."""
        return self.root / "suites" / f"{name}.json"

    def suites(self) -> dict[str, SuiteRecord]:
        """Return the records of all launched suites by name, such as ``headline@mini``; damaged ones are left out.

        Raises RecordError for one that a newer version wrote.
        """
        names = sorted(name for name in names_in(self.root / "suites") if name.endswith(".json"))
        found = {name: records.load_sound(SuiteRecord, self.root / "suites" / name) for name in names}
        return {name.removesuffix(".json"): record for name, record in found.items() if record is not None}

    def write_suite(self, path: Path, record: SuiteRecord) -> SuiteRecord:
        """Write a suite's record and return it as it now stands.

        Seeds and rows of the same setting that only the record before has are kept; a record of another setting is
        kept under ``suites/earlier``.
        """
        before = records.load_sound(SuiteRecord, path)
        if before is not None and before.setting == record.setting:
            record = record.with_rows_of(before)
        elif before is not None:
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(before.created))
            records.save(path.parent / "earlier" / f"{path.stem}-{stamp}.json", before)
        records.save(path, record)
        return record

    def keep_suites_file(self, name: str, text: str) -> str:
        """Keep a suites file under its content's digest, so that later commands know its suites; returns its path."""
        path = self.root / "suites" / "files" / hashlib.sha256(text.encode()).hexdigest()[:16] / name
        if not path.exists():
            write_text(path, text)
        return str(path.relative_to(self.root))

    def suite_records(self) -> list[SuiteRecord]:
        """Return the records of all launched suites."""
        return list(self.suites().values())
