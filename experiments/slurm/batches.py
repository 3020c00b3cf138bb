"""Which job arrays a launch is: under the limits of the site, in the order of their submission."""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.launch import smoke
from experiments.launch.profiles import SlurmProfile
from experiments.slurm.limits import Limits
from experiments.store.journal import BatchStage
from experiments.store.run_dir import Store
from experiments.suites.planning import PlannedRun

After = tuple[tuple[str, tuple[int, ...]], ...]
"""What a batch waits for: kinds of dependency, each with numbers of earlier batches."""


@dataclass(frozen=True)
class Target:
    """Where to submit to, and how."""

    name: str
    """The profile's name, or the path of its file."""
    profile: SlurmProfile
    smoke: bool = False


@dataclass(frozen=True)
class Batch:
    """One job array of a launch."""

    number: int
    stage: BatchStage
    runs: tuple[PlannedRun, ...] = ()
    after: After = ()
    parallelism: int = 1

    @property
    def count(self) -> int:
        """Elements of the array."""
        return len(self.runs) if self.stage != "report" else 1


def divide(
    missing: Sequence[PlannedRun], store: Store, target: Target, limits: Limits
) -> tuple[tuple[Batch, ...], tuple[PlannedRun, ...]]:
    """Return the arrays of a launch in the order of their submission, and the runs that the limits leave over."""
    profile = target.profile
    trained = [run for run in missing if profile.evaluate is not None and store.run(run.run_id).trained() is not None]
    fresh = list(without(missing, trained))
    short = smoke.runs(missing) if target.smoke else ()
    extra = len(short) + (profile.report is not False)
    fresh, trained, left = _fitting(fresh, trained, 1 if profile.evaluate is None else 2, extra, limits.submit)
    if not fresh and not trained:
        return (), left
    made: list[Batch] = []
    first = tuple(_add(made, "smoke", chunk) for chunk in _chunks(short, limits.array))
    before: After = (("afterok", first),) if first else ()
    _add_runs(made, fresh, trained, profile, limits, before)
    if profile.report is not False:
        _add(made, "report", (), (("afterany", tuple(range(len(made)))),))
    return tuple(made), left


def without(runs: Sequence[PlannedRun], others: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Return the runs that are not among the others."""
    names = {run.run_id for run in others}
    return tuple(run for run in runs if run.run_id not in names)


def _add(
    made: list[Batch], stage: BatchStage, runs: Sequence[PlannedRun], after: After = (), parallelism: int | None = None
) -> int:
    """Add a batch to those in the making; returns its number."""
    made.append(Batch(len(made), stage, tuple(runs), after, parallelism or max(1, len(runs))))
    return made[-1].number


def _add_runs(
    made: list[Batch],
    fresh: Sequence[PlannedRun],
    trained: Sequence[PlannedRun],
    profile: SlurmProfile,
    limits: Limits,
    before: After,
) -> None:
    """Arrays that do everything; or arrays that train, each with one that evaluates, and one for what is trained."""
    chunks, done = _chunks(fresh, limits.array), _chunks(trained, limits.array)
    split = profile.evaluate is not None
    shares = _shares(profile.parallelism, len(chunks))
    evaluating = _shares(profile.part("evaluate").parallelism, len(chunks) + len(done)) if split else []
    numbers: list[int] = []
    for index, chunk in enumerate(chunks):
        # more arrays than may run at a time: each of the further ones begins when an earlier one has ended
        queue = (("afterany", (numbers[index - profile.parallelism],)),) if index >= profile.parallelism else ()
        numbers.append(_add(made, "train" if split else "all", chunk, (*before, *queue), shares[index]))
        if split:
            _add(made, "evaluate", chunk, (("aftercorr", (numbers[-1],)),), evaluating[index])
    for index, chunk in enumerate(done):
        _add(made, "evaluate", chunk, before, evaluating[len(chunks) + index])


def _fitting(
    fresh: list[PlannedRun], trained: list[PlannedRun], each: int, extra: int, room: int | None
) -> tuple[list[PlannedRun], list[PlannedRun], tuple[PlannedRun, ...]]:
    """What may be submitted now: trained runs first, since they need least; ``each``: jobs of a fresh run."""
    if room is None:
        return fresh, trained, ()
    room = max(0, room - extra)
    evaluated = trained[:room]
    begun = fresh[: (room - len(evaluated)) // each]
    return begun, evaluated, (*trained[len(evaluated) :], *fresh[len(begun) :])


def _chunks(runs: Sequence[PlannedRun], most: int) -> list[Sequence[PlannedRun]]:
    """As few arrays as hold the runs, of nearly equal size."""
    count = -(-len(runs) // most)
    size = -(-len(runs) // count) if count else 1
    return [runs[start : start + size] for start in range(0, len(runs), size)]


def _shares(parallelism: int, arrays_: int) -> list[int]:
    """The cap on jobs at a time, which Slurm knows for each array alone, shared out among arrays; at least one each."""
    if not arrays_:
        return []
    least, more = divmod(parallelism, arrays_)
    return [max(1, least + (index < more)) for index in range(arrays_)]
