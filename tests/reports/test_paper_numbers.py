"""Published numbers: the file is validated, the verdicts are those of the statistics, and mini is never compared."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpformer.config.dotted import put
from mpformer.runtime.errors import UserError
from reports import pages, paper_numbers
from reports.build import _with_published
from reports.collect import SuiteReport
from reports.formats import render
from reports.paper_numbers import FIELDS, Number, beside, outside, read, schedule_name

Gather = Callable[..., SuiteReport]
LINE = dict.fromkeys(FIELDS, "") | {
    "table": "Table 1",
    "page": "5",
    "dataset": "coco",
    "task": "panoptic",
    "backbone": "R50",
    "schedule": "50ep",
    "row": "MP-Former",
    "metric": "AP",
    "kind": "value",
    "value": "15.6",
    "tolerance": "3",
    "source": "a paper",
    "how_sure": "verbatim",
}
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "published_numbers.csv"


def number(**changes: object) -> Number:
    fields = {key: value for key, value in LINE.items() if key not in ("value", "tolerance")}
    return replace(Number(line=2, value=15.6, words="", tolerance=3.0, **fields), **changes)  # type: ignore[arg-type]


def paper_report(gather: Gather) -> SuiteReport:
    """The headline suite as if it had run at the paper's scale on COCO with R50 for 50 epochs."""
    report = gather("headline")
    for view in report.views:
        config: Any = view.config
        config["dataset"]["name"] = "coco"
        config["schedule"] |= {"max_iter": 368750, "batch_size": 16}
        config["model"]["backbone"] |= {"depth": 50, "res2_channels": 256}
    return replace(report, table=replace(report.table, scale="paper", dataset="coco"))


def write(path: Path, *lines: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_the_committed_file_is_valid_and_says_how_sure() -> None:
    found = read()
    assert len(found) > 90
    assert all(n.source and n.how_sure for n in found)
    abstract = [(n.dataset, n.task, n.metric, n.value) for n in found if n.table == "abstract" and n.kind == "delta"]
    assert abstract == [("cityscapes", "instance", "AP", 2.3), ("cityscapes", "semantic", "mIoU", 1.6)]
    assert all(n.tolerance is not None for n in found if n.kind == "delta")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/reference/published_numbers.csv")
def test_the_committed_file_holds_every_known_number() -> None:
    known = [line["value"].lstrip("+").rstrip("M") for line in csv.DictReader(SHARED.open())]
    ours = [n.words if n.value is None else n.value for n in read()]
    assert len(known) == len(ours)
    for given, mine in zip(known, ours, strict=True):
        assert mine == given if isinstance(mine, str) else mine == float(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "line 2: unknown kind 'guess'; valid: value, delta, claim"),
        ({"value": "about 40"}, "line 2: value 'about 40' is not a number"),
        ({"tolerance": "-1"}, "line 2: tolerance -1 is negative"),
        ({"source": ""}, "line 2: source is empty; write `not stated`"),
        ({"task": "detection"}, "line 2: unknown task 'detection'; valid: instance"),
    ],
)
def test_a_bad_line_is_one_clear_message(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "numbers.csv", LINE | change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_header_and_a_missing_field_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("table,page\n1,2\n")
    with pytest.raises(UserError, match="the header must be: table,page,dataset"):
        read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(",".join(FIELDS) + "\nTable 1,5,coco\n")
    with pytest.raises(UserError, match="line 2: needs 15 fields"):
        read(tmp_path / "b.csv")
    with pytest.raises(UserError, match="cannot read the published numbers"):
        read(tmp_path / "absent.csv")


def test_mini_compares_directions_only(gather: Gather) -> None:
    published, note = beside(gather("headline"), [*read(), number(dataset="coco")])
    assert "not the paper's setting" in note
    assert [(p.metric, p.kind, p.verdict) for p in published] == [
        ("AP", "delta", "same direction (direction only)"),
        ("mIoU", "delta", "same direction (direction only)"),
    ]
    assert all(p.difference == "—" for p in published)


def test_opposite_direction_and_no_significance_are_said(gather: Gather) -> None:
    published, _ = beside(gather("headline", "nuclei"), [number(kind="delta", value=-2.0)])
    assert published[0].verdict == "opposite direction (direction only)"
    assert "not established" in published[0].why


def test_no_difference_is_no_direction() -> None:
    assert [paper_numbers._sign(product) for product in (0.0, 1.0, -1.0)] == [
        "no difference",
        "same direction",
        "opposite direction",
    ]


def test_verdicts(gather: Gather) -> None:
    report = paper_report(gather)
    kinds = {}
    for value, tolerance in ((15.6, 9.0), (15.6, 0.1), (60.0, 1.0), (15.6, None)):
        (item,), _ = beside(report, [number(value=value, tolerance=tolerance)])
        kinds[value, tolerance] = item.verdict
    assert list(kinds.values()) == ["within", "underpowered", "outside", "not comparable"]


def test_deltas_are_compared_with_deltas(gather: Gather) -> None:
    (item,), _ = beside(paper_report(gather), [number(kind="delta", value=2.3, tolerance=5.0)])
    assert item.verdict == "within"
    assert item.published == "+2.3"
    assert item.ours.startswith("+2.3")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("toggles.mp_queries", True, "ours is the difference to mask2former, which is not Mask2Former"),
        ("toggles.query_position", False, "ours is a difference in toggles.query_position too"),
        ("schedule.max_iter", 1234, "ours is a difference in schedule.max_iter too"),
        ("model.queries", 7, "ours is a difference in model.queries too"),
        ("model.init_weights", "elsewhere.pkl", ""),
        ("runtime.threads", 2, ""),
    ],
)
@pytest.mark.parametrize("scale", ["paper", "mini"])
def test_a_published_difference_stands_beside_one_of_the_same_kind_only(
    gather: Gather, scale: str, key: str, value: object, reason: str
) -> None:
    """Issue 12, 5.2: the baseline is Mask2Former of the same setting, and nothing but piloting differs."""
    report = paper_report(gather) if scale == "paper" else gather("headline")
    (baseline,) = (row for row in report.rows if row.name == "mask2former")
    for view in baseline.views:
        put(view.record.config, key, value)  # type: ignore[union-attr, arg-type]
    (item,), _ = beside(report, [number(kind="delta", value=2.3, tolerance=5.0)])
    expected = {"paper": "within", "mini": "same direction (direction only)"}[scale]
    assert item.verdict == ("not comparable" if reason else expected)
    assert reason in item.why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schedule": "12ep"}, "schedule 12ep, ours 50ep"),
        ({"backbone": "Swin-L"}, "backbone Swin-L, ours R50"),
        ({"backbone": "not stated"}, "backbone not stated, ours R50"),
        ({"variant": "multi-scale and flip"}, "multi-scale and flip"),
    ],
)
def test_other_settings_are_not_comparable(gather: Gather, change: dict[str, str], reason: str) -> None:
    (item,), _ = beside(paper_report(gather), [number(**change)])
    assert item.verdict == "not comparable"
    assert reason in item.why
    assert item.difference == "—"


def test_unstated_schedule_of_a_difference_is_a_caveat(gather: Gather) -> None:
    (item,), _ = beside(paper_report(gather), [number(kind="delta", value=2.3, tolerance=5.0, schedule="not stated")])
    assert item.verdict == "within"
    assert "the source does not state its schedule; ours is 50ep" in item.why


def test_other_datasets_rows_and_columns_do_not_concern_a_table(gather: Gather) -> None:
    others = [number(dataset="ade20k"), number(row="Mask DINO"), number(metric="GFLOPs"), number(task="semantic")]
    published, note = beside(paper_report(gather), others)
    assert published == ()
    assert "No published number" in note


def test_claims_are_shown_in_words(gather: Gather) -> None:
    (item,), _ = beside(paper_report(gather), [number(kind="claim", metric="any", value=None, words="outperforms")])
    assert (item.published, item.verdict) == ("outperforms", "claim")


def test_outside_is_what_the_check_fails_on(gather: Gather) -> None:
    report = paper_report(gather)
    published, _ = beside(report, [number(value=60.0, tolerance=1.0), number(value=15.6, tolerance=9.0)])
    lines = outside([("headline@paper", published)])
    assert len(lines) == 1
    assert lines[0].startswith("headline@paper: MP-Former, AP (value): ours 15.7 (n = 3), published 60.0")


def test_comparable_numbers_stand_in_the_table(gather: Gather) -> None:
    lines = [number(), number(value=15.7, source="another"), number(value=2.0, kind="delta"), number(schedule="12ep")]
    report = paper_report(gather)
    table = replace(report.table, published=beside(report, lines)[0])
    assert table.published_in == {("mp-former", "AP"): "15.6; 15.7; Δ +2.0"}
    assert table.published_columns == ("AP",)
    assert sum(width for _, width in table.groups_with_published) == len(table.columns) + 1
    markdown = render(table, "md")
    assert "| published |" in markdown
    assert markdown.index("<details>") > markdown.index("15.6; 15.7; Δ +2.0")
    assert "15.6; 15.7; Δ +2.0" in render(table, "csv")
    page = pages.suite_page(replace(report, table=table), (), None)
    assert '<td class="published" data-column="0">15.6; 15.7; Δ +2.0</td>' in page
    assert page.index("1 published number that ours may not be compared with") > page.index("Published beside ours")
    assert not any(item.comparable for item in beside(gather("headline"), lines)[0]), "never at scale mini"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"row": "MP-Fromer"}, "unknown row or method 'mp-fromer'; nearest: mp-former"),
        ({"backbone": "R-50"}, "unknown backbone 'R-50'; nearest: R50"),
        ({"dataset": "ade20"}, "unknown dataset 'ade20'; nearest: ade20k"),
        ({"kind": "suite", "words": "headlines", "value": None}, "unknown suite 'headlines'; nearest: headline"),
    ],
)
def test_a_line_that_no_suite_can_meet_is_a_warning(change: dict[str, Any], said: str) -> None:
    (warning,) = paper_numbers.warnings([number(), number(**change)])
    assert said in warning
    assert warning.startswith("paper_numbers.csv, line 2: ")


def test_the_committed_file_has_no_name_that_no_suite_has() -> None:
    assert paper_numbers.warnings(read()) == []


def test_which_lines_meet_which_suites() -> None:
    first, last, column = paper_numbers.met([number(), number(schedule="12ep"), number(metric="PQ_thing")])
    assert "coco-panoptic" in first
    assert "not comparable: schedule 12ep, ours 100ep" not in last
    assert "no suite has a column 'PQ_thing'; nearest: PQ_th" in column


def test_a_suite_is_numbered_as_soon_as_the_file_says_so(gather: Gather, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _with_published(gather("headline")).table.paper_table == ""
    line = number(table="Table 4", kind="suite", value=None, words="headline")
    monkeypatch.setattr(paper_numbers, "read", lambda: (line,))
    report = _with_published(gather("headline"))
    assert report.table.paper_table == "Table 4"
    assert report.table.published == ()
    assert "paper table <b>Table 4</b>" in pages.suite_page(report, (), None)


def test_schedule_names() -> None:
    assert schedule_name("coco", {"max_iter": 368750, "batch_size": 16}) == "50ep"
    assert schedule_name("cityscapes", {"max_iter": 90000, "batch_size": 16}) == "90k"


def test_family_of_a_row_is_its_preset() -> None:
    assert paper_numbers.family({"mp_queries": False, "query_position": True}) == "Mask2Former"
    assert paper_numbers.family({"mp_queries": True, "point_noise": 0.7}) == ""


def as_paper(store: Path) -> None:
    """Turn the headline suite's files into those of the paper's scale: COCO, R50, 50 epochs."""
    record = json.loads((store / "suites" / "headline@mini.json").read_text())
    (store / "suites" / "headline@paper.json").write_text(json.dumps(record | {"scale": "paper", "dataset": "coco"}))
    for run in (run for row in record["rows"] for run in row["runs"]):
        path = store / "runs" / run["run_id"] / "run.json"
        content = json.loads(path.read_text())
        content["config"]["dataset"]["name"] = "coco"
        content["config"]["schedule"] |= {"max_iter": 368750, "batch_size": 16}
        content["config"]["model"]["backbone"] |= {"depth": 50, "res2_channels": 256}
        path.write_text(json.dumps(content))


def report_check(store: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.cli.main", "report", "--check", "--root", str(store), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_fails_on_outside_and_on_nothing_else(store: Path) -> None:
    as_paper(store)
    failed = report_check(store, "headline", "--scale", "paper", "--dataset", "coco")
    assert failed.returncode == 1, failed.stderr
    assert "headline@paper: Mask2Former, AP (value): ours 13.3 (n = 3), published 41.7" in failed.stdout
    assert "MP-Former" in failed.stdout
    mini = report_check(store, "headline")
    assert mini.returncode == 0
    assert "direction only" in mini.stdout
    both = report_check(store, "--all", "headline")
    assert (both.returncode, both.stderr) == (
        2,
        "mpformer: --all is every suite that was launched; leave it out, or headline\n",
    )
