"""Finished runs of a suite into one file each, in their place or in another store, and back."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from experiments.runs.importing import Handled
from experiments.status import standing
from experiments.status.states import RunState, State
from experiments.store import archive as packing
from experiments.store import claims
from experiments.store.archive import Keeping
from experiments.store.records import RecordError
from experiments.store.run_dir import RunDir, Store
from experiments.store.suite_record import SuiteRecord
from mpformer.runtime.errors import UserError

_OVER = (State.FAILED, State.TIMEOUT)
"""States without a result that are worth keeping elsewhere: they say why there is none."""


def archive(
    store: Store,
    records: Sequence[SuiteRecord],
    dry_run: bool = False,
    keeping: Keeping = Keeping.WHOLE,
    seeds: Collection[int] | None = None,
) -> list[Handled]:
    """Pack the finished runs of the suites' records; raises UserError if the store cannot be written.

    ``seeds`` are those to take; None: all.
    """
    return [
        _archived(store.run(run_id), state, dry_run, keeping) for run_id, _, state in _states(store, records, seeds)
    ]


def _states(
    store: Store, records: Sequence[SuiteRecord], seeds: Collection[int] | None
) -> list[tuple[str, str, RunState]]:
    """Each run once, with its evaluation id and state; one that is done for the setting of some suite is done."""
    chosen = [run for record in records for _, run in record.runs() if seeds is None or run.seed in seeds]
    found = standing.look(store, [(run.run_id, run.eval_id) for run in chosen]).states
    states: dict[str, tuple[str, str, RunState]] = {}
    for (run_id, eval_id), state in found.items():
        if run_id not in states or state.state is State.DONE:
            states[run_id] = (run_id, eval_id, state)
    return list(states.values())


def _archived(run: RunDir, state: RunState, dry_run: bool, keeping: Keeping) -> Handled:
    if run.packed or state.state is not State.DONE:
        return Handled(run.run_id, "kept", "it is archived already" if run.packed else state.label)
    if dry_run:
        return Handled(run.run_id, "would be archived")
    claim = claims.acquire(run.claims)
    if claim is None:
        return Handled(run.run_id, "kept", "something works on it")
    try:
        run.pack(without={claim.path}, keeping=keeping)
    except OSError as error:
        claim.release()
        raise UserError(f"cannot archive {run.run_id}: {error}; nothing of it is lost") from None
    return Handled(run.run_id, "archived")


def archive_into(
    other: Store,
    store: Store,
    records: Sequence[SuiteRecord],
    dry_run: bool = False,
    keeping: Keeping = Keeping.WHOLE,
    seeds: Collection[int] | None = None,
) -> list[Handled]:
    """Write the archives, and the suites' records, into another store; this one stays as it is.

    Failed runs go along, and are replaced once they are done; everything else that is there is left alone. Raises
    UserError if the other store cannot be written.
    """
    try:
        found = [
            _written(other.run(run_id), store.run(run_id), eval_id, state, dry_run, keeping)
            for run_id, eval_id, state in _states(store, records, seeds)
        ]
        if not dry_run:
            _write_records(other, store, records)
    except OSError as error:
        raise UserError(f"cannot write to {other.root}: {error}; what is there already is whole") from None
    return found


def _written(there: RunDir, run: RunDir, eval_id: str, state: RunState, dry_run: bool, keeping: Keeping) -> Handled:
    if there.exists() and (state.state is not State.DONE or there.result(eval_id) is not None or not there.packed):
        return Handled(run.run_id, "kept", "it is there already")
    if state.state is not State.DONE and state.state not in _OVER:
        return Handled(run.run_id, "kept", state.label)
    if claims.holder(run.claims) is not None:
        return Handled(run.run_id, "kept", "something works on it")
    if not dry_run:
        try:
            with run.whole() as whole:
                _pack(whole, there, keeping)
        except RecordError as error:
            return Handled(run.run_id, "refused", str(error))
    reason = "" if state.state is State.DONE else f"{state.label}: {state.detail}"
    return Handled(run.run_id, "would be archived" if dry_run else "archived", reason)


def _pack(run: RunDir, there: RunDir, keeping: Keeping) -> None:
    """Write a run's archive; one that lacks something already is copied as it is."""
    if run.original is not None and packing.manifest(run.archive).left_out:
        packing.copy(run.archive, there.archive)
    else:
        packing.write(run.path, there.archive, keeping=keeping)


def _write_records(other: Store, store: Store, records: Sequence[SuiteRecord]) -> None:
    """Suites' records and files; where the data lay on this machine is of no use elsewhere."""
    for name, record in store.suites().items():
        if record in records:
            other.write_suite(other.suite_path(name), replace(record, data_root=""))
            if record.file:
                kept = store.root / record.file
                other.keep_suites_file(kept.name, kept.read_text())


def unpack(store: Store, records: Sequence[SuiteRecord], dry_run: bool = False) -> list[Handled]:
    """Put directories in the place of the suites' archives; raises UserError for one that is damaged.

    An archive without weights stays one.
    """
    runs = [store.run(run_id) for run_id in dict.fromkeys(run.run_id for record in records for _, run in record.runs())]
    return [_unpacked(run, dry_run) for run in runs if run.packed]


def _unpacked(run: RunDir, dry_run: bool) -> Handled:
    left_out = packing.manifest(run.archive).left_out
    if run.was_archived_without(packing.WEIGHTS):
        return Handled(run.run_id, "kept", "it was archived without its weights and stays an archive")
    if not dry_run:
        run.unpack()
    reason = f"without {len(left_out)} files that were left out" if left_out else ""
    return Handled(run.run_id, "would be unpacked" if dry_run else "unpacked", reason)
