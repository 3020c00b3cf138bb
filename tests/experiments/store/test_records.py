"""Every record comes back as it was written; whatever else a file holds is one line that names it."""

import ast
import dataclasses
import json
import pkgutil
import typing
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import store
from experiments.store import attempt_dir, claims, records
from experiments.store.attempt_dir import FailureClass, Stop, StopReason
from experiments.store.records import NewerRecordError, Record, RecordError

ROOT = Path(__file__).resolve().parents[3]
OWNERS = [import_module(f"experiments.store.{one.name}") for one in pkgutil.iter_modules(store.__path__)]

KINDS = sorted(
    (
        kind
        for owner in OWNERS
        for kind in vars(owner).values()
        if isinstance(kind, type)
        and issubclass(kind, Record)
        and kind is not Record
        and kind.__module__ == owner.__name__
    ),
    key=lambda kind: kind.__name__,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
st.register_type_strategy(Mapping, st.dictionaries(st.text(max_size=5), PLAIN, max_size=3))
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))

fast = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def a_record(kind: type[Record]) -> st.SearchStrategy[Record]:
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)} | {"schema"}
    more = st.dictionaries(st.text(max_size=5).filter(lambda key: key not in names), PLAIN, max_size=2)
    fields = {name: _mapping(hints[name]) for name in names - {"schema"} if "Mapping" in str(hints[name])}
    return st.builds(kind, **fields | ({"more": more} if "more" in names else {}))


def _mapping(hint: Any) -> st.SearchStrategy[Any]:
    """Records by name, or plain data, whatever its values are annotated with."""
    inner = typing.get_args(hint)[1:]
    of_records = [st.from_type(kind) for kind in inner if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return st.dictionaries(st.text(max_size=5), of_records[0] if of_records else PLAIN, max_size=3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@fast
@given(data=st.data())
def test_a_record_comes_back_as_it_was_written(kind: type[Record], data: st.DataObject, tmp_path: Path) -> None:
    record = data.draw(a_record(kind))
    path = tmp_path / "record.json"
    records.save(path, record)
    assert records.load(kind, path) == record
    assert records.load_sound(kind, path) == record


def said_of(kind: type[Record], path: Path) -> str:
    """The line of a file that cannot be read as a record; empty if it can."""
    try:
        records.load(kind, path)
    except RecordError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@fast
@given(data=st.data())
def test_a_damaged_record_is_one_line_that_names_its_file(
    kind: type[Record], data: st.DataObject, tmp_path: Path
) -> None:
    """Cut short anywhere, or with any value replaced by any other: the record, or one line; never anything else."""
    content = records.encode(data.draw(a_record(kind)))
    text = json.dumps(content)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    garbled = json.dumps({**content, data.draw(st.sampled_from(sorted(content))): data.draw(PLAIN)})
    for damaged in (cut, garbled):
        path = tmp_path / "record.json"
        path.write_text(damaged)
        said = said_of(kind, path)
        assert not said or (str(path) in said and len(said.splitlines()) == 1)
    path.write_text(cut)
    assert records.load_sound(kind, path) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_newer_record_is_one_line_and_not_taken_for_an_absent_one(kind: type[Record], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"schema": kind.schema + 1, "anything": "else"}))
    for load in (records.load, records.load_sound):
        with pytest.raises(NewerRecordError, match=r"record\.json was written by a newer mpformer .*: update"):
            load(kind, path)


def test_what_is_absent_is_no_error(tmp_path: Path) -> None:
    assert records.load(claims.ClaimRecord, tmp_path / "none") is None


def test_a_wrong_value_is_named_with_what_is_valid() -> None:
    with pytest.raises(RecordError, match=r"stage.json is damaged .failure_class: .sun. is none of .*"):
        records.decode(attempt_dir.AttemptRecord, {"failure_class": "sun"}, "stage.json")


def test_every_failure_that_the_model_raises_has_its_class() -> None:
    """The model knows nothing of records: what it calls its failures is compared with the enumeration here."""
    found = set()
    for folder in ("mpformer", "analysis", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RunFailure" and node.args:
                    name = node.args[0]
                    found |= {name.value} if isinstance(name, ast.Constant) else set()
    assert {"nan", "oom", "node", "disk", "data"} <= found
    assert found - {"report"} <= set(FailureClass), "a report job is no run"


def test_the_strongest_reason_to_stop_is_the_last_of_its_list() -> None:
    reasons = [StopReason(stop, "because") for stop in Stop]
    assert max(reversed(reasons), key=lambda reason: reason.strength).stop is Stop.CANCELLED
    requeued, interrupted = StopReason(Stop.REQUEUED), StopReason(Stop.INTERRUPTED)
    assert requeued.strength > interrupted.strength
    assert [str(StopReason(Stop.TIMEOUT)), str(reasons[0])] == ["timeout", "interrupted: because"]
    assert {stop.outcome for stop in Stop} < set(attempt_dir.Outcome)
