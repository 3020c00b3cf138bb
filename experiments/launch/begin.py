"""The first steps of every launch, whichever executor then takes its runs.

Launches of one store begin one at a time: each holds the store's launch claim (``<root>/launching/<n>``, made and
judged as the claims on runs are) from its first look at the runs until it has started or submitted the last of them.
Whoever comes second waits, and then finds the first one's runs queued. The claim of a launcher that died is taken over
at once on the same machine, and after the heartbeat's timeout on another.
"""

import contextlib
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.status import scheduler, standing
from experiments.status.states import State, should_start
from experiments.store import claims, journal
from experiments.store.archive import WEIGHTS
from experiments.store.claims import Claim, ClaimLost
from experiments.store.files import side_by_side
from experiments.store.journal import Submission
from experiments.store.run_dir import LIGHT_HINT, Store
from experiments.suites import planning
from experiments.suites.planning import Plan, PlannedRun
from mpformer.runtime.errors import UserError

DOUBT_SECONDS = 20.0
"""Time in which an ``sbatch`` whose launcher was killed may still reach the controller."""

WAIT_SECONDS = 0.3
"""Time between two looks at another launch's claim."""

SILENT_SECONDS = 3.0
"""Wait for another launch of which nothing is said."""


@dataclass(frozen=True)
class Beginning:
    """A launch that is about to start its runs; no other launch of the store begins meanwhile."""

    id: str
    directory: Path
    """``launches/<id>``, which need not exist yet."""
    missing: tuple[PlannedRun, ...]
    """The runs to start."""
    left_alone: dict[str, str]
    """Failed runs that would fail again, with their failure class."""
    claim: Claim

    def confirm(self) -> None:
        """Raise UserError if another launch has gone on in this one's place: nothing more may be started then."""
        try:
            self.claim.confirm()
        except ClaimLost:
            raise UserError(
                "this launch gave no sign of life for so long that another one has taken its place; launch again"
            ) from None


@contextlib.contextmanager
def begin(plan: Plan, store: Store, command: str = "", retry: tuple[str, ...] = ()) -> Iterator[Beginning]:
    """Record a plan and find what is missing of it, alone among the launches of the store while the block runs.

    In order: what launchers left open that died is looked up, the plan is recorded, earlier requests to stop its runs
    are taken back. Raises UserError if data or weights are missing, OSError if the store cannot be written.
    """
    if plan.missing:
        raise UserError("; ".join(plan.missing))
    with claims.held(_acquired(store.root / "launching")) as claim:
        recover(store)
        record(plan, store, command)
        missing, left_alone = to_start(plan, store, retry)
        if uncancel(missing, store):  # whose jobs still wait, or still work: they go on after all
            missing, left_alone = to_start(plan, store, retry)
        _check_weights(missing, store)
        name = new_id()
        yield Beginning(name, store.launches / name, tuple(missing), left_alone, claim)


def _acquired(directory: Path) -> Claim:
    """Return the store's launch claim, once no other launch holds it."""
    began, said = time.monotonic(), False
    while True:
        if (claim := claims.acquire(directory)) is not None:
            return claim
        if not said and time.monotonic() - began > SILENT_SECONDS:
            said = True
            owner = claims.read(directory, claims.highest(directory))
            where = f"process {owner.pid} on {owner.host or 'an unknown host'}"
            print(f"mpformer: waiting for another launch into this store ({where})", file=sys.stderr, flush=True)
        time.sleep(WAIT_SECONDS)


def record(plan: Plan, store: Store, command: str) -> None:
    """Write the suite's record and the runs' immutable files; raises OSError if the store cannot be written."""
    side_by_side(lambda run: store.run(run.run_id).create(run.config, run.row.name), plan.unique)
    planning.write_record(plan, store, command)


def to_start(plan: Plan, store: Store, retry: tuple[str, ...] = ()) -> tuple[list[PlannedRun], dict[str, str]]:
    """Return the runs that a launch has to start, and the failed ones that it leaves alone with their class."""
    states = standing.look_at_plan(plan, store)
    missing = [run for run in plan.unique if should_start(states[run.run_id], retry)]
    rest = [state for state in states.values() if state.state is State.FAILED and not should_start(state, retry)]
    return missing, {state.run_id: state.failure_class for state in rest}


def _check_weights(runs: Sequence[PlannedRun], store: Store) -> None:
    """Raise UserError for trained runs that another evaluation would need the weights of, which were not archived."""
    found = [store.run(run.run_id) for run in runs]
    light = [run for run in found if run.packed and run.was_archived_without(WEIGHTS) and run.trained() is not None]
    if light:
        more = f" and {len(light) - 1} more runs were" if len(light) > 1 else " was"
        raise UserError(f"{light[0].run_id}{more} archived without weights, which evaluating needs; {LIGHT_HINT}")


def uncancel(runs: Sequence[PlannedRun], store: Store) -> bool:
    """Take back earlier requests to stop these runs; whether there were any."""
    files = [store.run(run.run_id).cancel_file for run in runs]
    asked = [file for file in files if file.exists()]
    for file in asked:
        file.unlink(missing_ok=True)
    return bool(asked)


def new_id() -> str:
    """Return an id for a launch: its time, and what tells it from others of the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


# --- what launchers left open that died ------------------------------------------------------------------------------


def recover(store: Store) -> None:
    """Complete the journals of launchers that died between ``sbatch`` and its record; under the launch claim.

    Batches that Slurm knows by their name get their id; those that it does not know never reached it. Waits until no
    orphaned ``sbatch`` can be under way; leaves a batch open that Slurm cannot be asked about.
    """
    while lost := [one for one in journal.submissions(store) if one.unrecorded]:
        if not _recovered(store, lost):
            return
        time.sleep(1)


def _recovered(store: Store, lost: Sequence[Submission]) -> bool:
    """Write down what is known of lost batches; whether it is worth asking again."""
    answer = scheduler.ask(lost)
    ids = {job.name: job.id.partition("_")[0] for job in answer.jobs}
    again = False
    for one in lost:
        book = journal.of_launch(store, one.launch)
        if one.name in ids:
            book.submitted(one.batch, ids[one.name])
        elif answer.controller and (one.clusters or one.cluster in ("", answer.cluster)):
            again = again or time.time() - one.time < DOUBT_SECONDS
            if time.time() - one.time >= DOUBT_SECONDS:
                book.failed(one.batch, "the launcher ended before the batch reached Slurm")
    return again
