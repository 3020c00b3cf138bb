"""Finished runs of a suite into one file each, and back (:mod:`experiments.store.archive`)."""

from collections.abc import Sequence

from experiments.runs.importing import Handled
from experiments.status import standing
from experiments.status.states import State
from experiments.store import claims
from experiments.store.run_dir import RunDir, Store
from experiments.store.suite_record import SuiteRecord
from mpformer.runtime.errors import UserError


def archive(store: Store, records: Sequence[SuiteRecord], dry_run: bool = False) -> list[Handled]:
    """Pack the finished runs of the suites' records; raises UserError if the store cannot be written."""
    keys = [(run.run_id, run.eval_id) for record in records for _, run in record.runs()]
    states = standing.look(store, keys).states
    ids = list(dict.fromkeys(run_id for run_id, _ in keys))
    unfinished = {run_id: state.label for (run_id, _), state in states.items() if state.state is not State.DONE}
    return [_archived(store.run(run_id), unfinished.get(run_id, ""), dry_run) for run_id in ids]


def _archived(run: RunDir, unfinished: str, dry_run: bool) -> Handled:
    if run.packed or unfinished:
        return Handled(run.run_id, "kept", unfinished or "it is archived already")
    if dry_run:
        return Handled(run.run_id, "would be archived")
    claim = claims.acquire(run.claims)
    if claim is None:
        return Handled(run.run_id, "kept", "something works on it")
    try:
        run.pack(without={claim.path})
    except OSError as error:
        claim.release()
        raise UserError(f"cannot archive {run.run_id}: {error}; nothing of it is lost") from None
    return Handled(run.run_id, "archived")


def unpack(store: Store, records: Sequence[SuiteRecord], dry_run: bool = False) -> list[Handled]:
    """Put directories in the place of the suites' archives; raises UserError for one that is damaged."""
    runs = [store.run(run_id) for run_id in dict.fromkeys(run.run_id for record in records for _, run in record.runs())]
    packed = [run for run in runs if run.packed]
    if not dry_run:
        for run in packed:
            run.unpack()
    return [Handled(run.run_id, "would be unpacked" if dry_run else "unpacked") for run in packed]
