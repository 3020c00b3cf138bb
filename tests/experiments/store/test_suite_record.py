from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from experiments.store import records
from experiments.store.run_dir import Store
from experiments.store.suite_record import SuiteRecord, SuiteRow, SuiteRun


def row(name: str, *seeds: int, launch: str = "") -> SuiteRow:
    return SuiteRow(name, runs=tuple(SuiteRun(seed, f"{name}-{seed}{launch}", "e") for seed in seeds))


def record(*rows: SuiteRow, setting: str = "") -> SuiteRecord:
    return SuiteRecord("headline", "mini", "shapes", rows, setting=setting, created=1.0)


def seeds(found: SuiteRecord) -> dict[str, list[int]]:
    return {row.name: [run.seed for run in row.runs] for row in found.rows}


@given(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_a_row_has_the_seeds_of_both_launches_and_the_newer_run_of_a_seed(old: set[int], new: set[int]) -> None:
    merged = row("a", *new, launch="+").with_runs_of(row("a", *old))
    assert [run.seed for run in merged.runs] == sorted(old | new)
    assert all(run.run_id.endswith("+") == (run.seed in new) for run in merged.runs)


def test_a_launch_adds_to_the_record_of_its_setting_and_replaces_that_of_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.suite_path("headline@mini")
    store.write_suite(path, record(row("a", 1), row("b", 0)))
    assert seeds(store.write_suite(path, record(row("a", 0)))) == {"a": [0, 1], "b": [0]}
    assert seeds(store.write_suite(path, record(row("a", 0), setting="other"))) == {"a": [0]}
    (earlier,) = (tmp_path / "suites" / "earlier").iterdir()
    kept = records.load(SuiteRecord, earlier)
    assert kept is not None
    assert seeds(kept) == {"a": [0, 1], "b": [0]}


def test_damaged_records_of_suites_are_left_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_suite(store.suite_path("headline@mini"), record(row("a", 0)))
    (tmp_path / "suites" / "other@mini.json").write_text('{"suite": "other"}')
    assert list(store.suites()) == ["headline@mini"]
