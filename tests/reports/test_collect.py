"""Store → tables: what a cell says in every state a run can be in."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis import layer_table
from analysis.jumps import jump_rates
from experiments.store.files import write_json
from experiments.store.run_dir import Store
from experiments.suites.scales import suite_name
from mpformer.runtime.errors import UserError
from reports import definitions, escape, pages, run_page, text
from reports.collect import SuiteReport, collect, records, tick
from reports.formats import render
from reports.model import Cell, Kind, grouped
from reports.render import TEMPLATES
from reports.runs import FAILURES, Reader
from tests.reports.conftest import LIVE
from tests.support.present import present

Gather = Callable[..., SuiteReport]


def cell(report: SuiteReport, row: str, metric: str) -> Cell:
    keys = [column.key for column in report.table.columns]
    found = next(r for r in report.table.rows if r.name == row)
    return found.cells[keys.index(metric)]


def note(report: SuiteReport, row: str) -> str:
    return next(r for r in report.table.rows if r.name == row).note


def test_complete_cell_has_mean_std_n_and_every_seed(gather: Gather) -> None:
    found = cell(gather("headline"), "mask2former", "AP")
    values = [value.value for value in found.values]
    mean = sum(values) / 3
    assert found.kind is Kind.VALUE
    assert found.n == found.planned == 3
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    assert found.reason == ""


def test_delta_is_paired_by_seed_with_interval_and_holm(gather: Gather) -> None:
    report = gather("headline")
    base, ours = (cell(report, name, "AP") for name in ("mask2former", "mp-former"))
    assert ours.delta is not None
    assert base.delta is None
    differences = [a.value - b.value for a, b in zip(ours.values, base.values, strict=True)]
    assert ours.delta.mean == pytest.approx(sum(differences) / 3)
    assert present(ours.delta.low) < ours.delta.mean < present(ours.delta.high)
    assert ours.delta.p_holm == pytest.approx(ours.delta.p)  # one hypothesis only
    assert present(cell(report, "mp-former", "PQ").delta).p_holm is None  # Holm is about the primary metric alone


def test_holm_counts_the_rows_of_the_table(gather: Gather) -> None:
    report = gather("components")
    deltas = [row.cells[0].delta for row in report.table.rows]
    tested = [d for d in deltas if d is not None and d.p is not None]
    assert [d.p_holm for d in tested] == [d.p for d in tested]
    assert deltas[1] is not None
    assert deltas[1].n == 2
    assert deltas[1].p is None  # two pairs allow no test


def test_best_is_marked_among_complete_numbers_only(gather: Gather) -> None:
    report = gather("components")
    assert [row.cells[0].best for row in report.table.rows] == [False, False, False, False, True]


def test_fewer_seeds_than_planned_are_said(gather: Gather) -> None:
    report = gather("components")
    found = cell(report, "mp-queries", "AP")
    assert (found.kind, found.n, found.planned, found.std) == (Kind.PARTIAL, 2, 3, None)
    assert "seed 2: failed (out of memory) at iteration 320 of 1200" in note(report, "mp-queries")


def test_running_seed_shows_its_probe_and_iteration(gather: Gather) -> None:
    report = gather("components")
    found = cell(report, "guided", "AP")
    assert (found.kind, found.n, found.short) == (Kind.PARTIAL, 0, "probe 800/1200")
    assert found.has_number
    assert "seed 0: iteration 800 of 1200" in found.reason
    assert "probe on a few images at iteration 800" in found.reason
    assert note(report, "guided") == found.reason
    assert found.delta is None
    layer = cell(report, "guided", "Util")
    assert layer.kind is Kind.MISSING
    assert not layer.has_number
    assert "never launched" in layer.reason


def test_stale_and_void_numbers_are_shown_as_such_and_enter_no_mean(gather: Gather) -> None:
    report = gather("components")
    found = cell(report, "point-noise", "AP")
    assert (found.kind, found.n, found.delta) == (Kind.STALE, 0, None)
    text = note(report, "point-noise")
    assert "seed 0: void: point noise was drawn once (bug 12)" in text
    assert "seed 1: stale: made with another evaluation setting" in text
    assert "seed 2: lost" in text


def test_an_evaluation_at_another_threshold_is_stale_and_says_so(gather: Gather, store: Path) -> None:
    """Issue 12, 5.12: what was scored at 0.8 before scale mini's threshold became 0.2, and is planned anew since."""
    path = store / "suites" / "headline@mini.json"
    record = json.loads(path.read_text())
    (made,) = {run["eval_id"] for row in record["rows"] for run in row["runs"]}
    for row in record["rows"]:
        for run in row["runs"]:
            run["eval_id"] = "panoptic-new"
            setting = {"object_mask_threshold": 0.8, "instance": True}
            write_json(store / "runs" / run["run_id"] / "evals" / made / "setting.json", setting)
    record["evaluations"] = {"panoptic-new": {"object_mask_threshold": 0.2, "instance": True}}
    path.write_text(json.dumps(record))
    found = cell(gather("headline"), "mp-former", "PQ")
    assert (found.kind, found.short) == (Kind.STALE, "stale (threshold 0.8)")
    assert "stale: made with threshold 0.8" in found.reason


def log_probe(store: Path, row: str, seed: int, iteration: int) -> None:
    """One more run of the row that trains: it has logged this iteration, and its last probe 290 before."""
    source = next((store / "runs").glob(f"{LIVE}*"))
    run_id = f"{source.name}-{seed}"
    shutil.copytree(source, store / "runs" / run_id)
    path = store / "runs" / run_id / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_id": run_id, "seed": seed}))
    lines = [json.loads(line) for line in (store / "runs" / run_id / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] == "train" and line["iteration"] <= iteration]
    probe = next(line for line in lines if line["kind"] == "evaluation") | {"iteration": iteration - 290}
    text = "\n".join(json.dumps(line) for line in [*kept, probe, kept[-1] | {"iteration": iteration}])
    (store / "runs" / run_id / "metrics.jsonl").write_text(text + "\n")
    record = json.loads((store / "suites" / "components@mini.json").read_text())
    rows = {each["name"]: each for each in record["rows"]}
    rows[row]["runs"][seed] |= {"run_id": run_id}
    (store / "suites" / "components@mini.json").write_text(json.dumps(record))


def test_probes_say_their_own_iteration_and_enter_no_mean(gather: Gather, store: Path) -> None:
    log_probe(store, "guided", 1, 640)
    found = cell(gather("components"), "guided", "AP")
    assert (found.kind, found.n, found.mean, len(found.values)) == (Kind.PARTIAL, 0, None, 2)
    assert found.short == "probe 350 … 800/1200", "not the iterations that the runs have reached"
    assert "at iteration 350, 800" in found.reason
    low, high = sorted(value.value for value in found.values)
    column = gather("components").table.columns[0]
    assert text.mean(found, column) == f"{low:.1f} … {high:.1f}"


def test_what_does_not_count_never_looks_like_a_result(gather: Gather) -> None:
    """Wherever a page prints the number of a seed or a row, it is marked as what it is."""
    report = gather("components")
    page = pages.suite_page(report, (), None) + str(pages.card(report.table))
    printed = re.findall(r'<span class="number (\w+)(?: best)?"><span class="num">([^<]*)', page)
    assert len(printed) > 80
    for row in report.table.rows:
        for found, column in zip(row.cells, report.table.columns, strict=True):
            shown = (
                {(str(found.kind), text.mean(found, column) + text.flags(found))}
                if found.n or not found.values
                else set()
            )
            shown |= {(str(found.value_kind), text.number(v.value, column.decimals + 1)) for v in found.values}
            assert shown <= set(printed), (row.name, column.key)
    stray = re.sub(r"<(script|style|pre|svg).*?</\1>|<span class=\"number.*?</span></span>", "", page, flags=re.DOTALL)
    for row in report.table.rows:
        for found, column in zip(row.cells, report.table.columns, strict=True):
            if found.kind in (Kind.STALE, Kind.VOID):
                assert f">{text.mean(found, column)}<" not in stray


def test_one_macro_prints_a_number_wherever_it_stands() -> None:
    """No template of a page marks a number up, or asks for a table's number, but the macros of table.html.j2."""
    macros, *others = sorted(TEMPLATES.glob("*.html.j2"), key=lambda path: path.name != "table.html.j2")
    assert macros.read_text().count('class="num') == 2, "the number, and what it is in"
    assert "{% macro marked(" in macros.read_text()[: macros.read_text().index('class="num')]
    assert len(others) >= 8
    asked = re.compile(r'class="num|text\.(mean|spread|delta|number|signed)\(|\.(mean|std|delta\.mean|value)\b *[}|~]')
    assert {path.name: asked.findall(path.read_text()) for path in others if asked.search(path.read_text())} == {}


def test_no_badge_says_unknown_or_that_it_does_not_apply(gather: Gather, store: Path) -> None:
    path = store / "suites" / "components@mini.json"
    record = json.loads(path.read_text())
    write_json(path, {**record, "paper_table": "unknown", "dataset": ""})
    report = gather("components")
    runs = [section for _, sections in run_page.sections(report) for section in sections]
    assert runs
    shown = [
        pages.suite_page(report, (), None),
        *(pages.run_page(report, section, index_link="") for section in runs[:4]),
    ]
    for page in shown:
        (badges,) = re.findall(r'<ul class="badges">(.*?)</ul>', page, flags=re.DOTALL)
        said = re.findall(r"<li>([^<]*)<b>(.*?)</b></li>", badges)
        assert dict(said)["suite "] == "components"
        assert not [name for name, value in said if value.strip().lower() in ("", "unknown", "n/a", "none", "–")]


def test_the_bar_fills_by_iterations(gather: Gather) -> None:
    table = gather("components").table
    shares = dict(table.trained)
    counts = dict(table.progress)
    assert shares["DONE"] == pytest.approx(counts["DONE"] / table.runs)
    assert shares["RUNNING"] == pytest.approx(800 / 1200 / table.runs)
    assert "PLANNED" not in shares
    assert f"{table.percent:.0f} % of all iterations" in pages.suite_page(gather("components"), (), None)


def test_rows_that_share_a_label_are_told_apart(gather: Gather, store: Path) -> None:
    path = store / "suites" / "components@mini.json"
    record = json.loads(path.read_text())
    for row in record["rows"][1:3]:
        row["label"] = "point noise 0.2"
    path.write_text(json.dumps(record))
    labels = [row.label for row in gather("components").table.rows]
    assert len(set(labels)) == len(labels)
    assert labels[1] == f"point noise 0.2 ({record['rows'][1]['name']})"


def test_void_alone_is_a_void_cell(gather: Gather, store: Path) -> None:
    record = json.loads((store / "suites" / "components@mini.json").read_text())
    row = next(row for row in record["rows"] if row["name"] == "point-noise")
    row["runs"] = row["runs"][:1]
    (store / "suites" / "components@mini.json").write_text(json.dumps(record))
    assert cell(gather("components"), "point-noise", "AP").kind is Kind.VOID


def test_older_identity_scheme_is_stale(gather: Gather, store: Path) -> None:
    for path in store.glob("runs/shapes-panoptic-m2f-*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"scheme": 0}))
    found = cell(gather("headline"), "mask2former", "AP")
    assert found.kind is Kind.STALE
    assert "an older identity scheme" in found.reason


def test_mixed_commits_are_flagged(gather: Gather) -> None:
    report = gather("headline")
    assert cell(report, "mp-former", "AP").flags == ("†",)
    assert cell(report, "mask2former", "AP").flags == ()
    assert len(report.table.commits) == 2
    assert "mixed commits" in report.table.warnings[0]


def test_metric_that_does_not_apply_says_why(gather: Gather) -> None:
    report = gather("headline", "nuclei")
    assert "PQ" not in [column.key for column in report.table.columns], "n/a everywhere: a note instead of a column"
    assert any(n.text.startswith("PQ: does not apply: nuclei has one class") for n in report.table.footnotes)
    asked = gather("headline", "nuclei", columns=["AP", "PQ"])
    found = cell(asked, "mp-former", "PQ")
    assert (found.kind, found.reason) == (Kind.MISSING, "does not apply: nuclei has one class and no stuff")


def test_one_seed_says_no_significance(gather: Gather) -> None:
    report = gather("headline", "nuclei")
    found = cell(report, "mp-former", "AP")
    assert (found.n, found.std, present(found.delta).p) == (1, None, None)
    assert "n = 1, no significance" in report.table.caption


def test_caption_names_scale_dataset_preset_and_hardware(gather: Gather) -> None:
    caption = gather("headline").table.caption
    for part in (
        "Scale mini",
        "not the paper's setting",
        "shapes",
        "mp-former/paper",
        "8-core laptop CPU",
        "1,200 iterations",
    ):
        assert part in caption


def test_definitions_of_every_column_are_stated(gather: Gather) -> None:
    texts = [note.text for note in gather("headline", columns=list(definitions.COLUMNS)).table.footnotes]
    assert not [column.key for column in definitions.COLUMNS.values() if column.definition not in texts]


def test_component_table_ticks_what_differs(gather: Gather) -> None:
    table = gather("components").table
    assert [column.key for column in table.tick_columns] == ["mp_queries", "guided_layers", "point_noise", "flip_noise"]
    assert table.rows[0].ticks == ("no", "no", "no", "no")
    assert table.rows[4].ticks == ("yes", "every", "0.2", "0.2")
    assert tick(0.25) == "0.25"


def test_equal_numbers_are_best_of_nothing(gather: Gather, store: Path) -> None:
    for path in store.glob("runs/nuclei-*/evals/*/result.json"):
        content = json.loads(path.read_text())
        content["metrics"] = {"AP": 0.0, "mIoU-L": None}
        path.write_text(json.dumps(content))
    report = gather("headline", "nuclei", columns=["AP", "mIoU-L", "Util"])
    assert not any(row.cells[0].best for row in report.table.rows)
    assert "nothing is left to average over" in cell(report, "mp-former", "mIoU-L").reason
    assert cell(report, "mp-former", "Util").reason == "Util was not measured"


def test_overrides_of_a_launch_are_in_the_caption(gather: Gather, store: Path) -> None:
    path = store / "suites" / "headline@mini.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": {"schedule.max_iter": 12}}))
    assert "Changed in every row: schedule.max_iter = 12." in gather("headline").table.caption


def test_columns_and_decimals_can_be_chosen(gather: Gather) -> None:
    table = gather("headline", columns=["AP50", "hours"], decimals=3).table
    assert [(c.key, c.decimals) for c in table.columns] == [("AP50", 3), ("hours", 3)]
    with pytest.raises(UserError, match="unknown column 'APx'; valid: AP, AP50"):
        gather("headline", columns=["APx"])


def test_unknown_suite_lists_the_launched_ones(store: Path) -> None:
    with pytest.raises(UserError, match=r"unknown launched suite 'nothing@mini'; valid: components@mini"):
        records(Store(store), ["nothing"], "mini", None)


def test_empty_store_says_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mpformer launch headline"):
        records(Store(tmp_path), ["headline"], "mini", None)


def test_half_written_files_are_no_crash(gather: Gather, store: Path) -> None:
    for path in store.glob("runs/shapes-panoptic-m2f-*/metrics.jsonl"):
        path.write_text(path.read_text() + '{"kind": "train", "itera')
    for path in store.glob("runs/shapes-panoptic-m2f-s0-*/evals/*/result.json"):
        path.write_text(path.read_text()[:100])
    found = cell(gather("headline"), "mask2former", "AP")
    assert (found.kind, found.n) == (Kind.PARTIAL, 2)
    assert "trained, not evaluated" in found.reason or "not evaluated" in found.reason


def test_not_finite_result_does_not_count(gather: Gather, store: Path) -> None:
    for path in store.glob("runs/shapes-panoptic-m2f-s0-*/evals/*/result.json"):
        content = json.loads(path.read_text())
        content["metrics"]["AP"] = float("nan")
        path.write_text(json.dumps(content))
    assert cell(gather("headline"), "mask2former", "AP").n == 2


def test_rows_that_do_not_apply_say_why(gather: Gather, store: Path) -> None:
    path = store / "suites" / "headline@mini.json"
    record = json.loads(path.read_text())
    record["rows"].append(
        {"name": "x", "label": "x", "toggles": {}, "changes": {}, "runs": [], "not_applicable": "one class"}
    )
    path.write_text(json.dumps(record))
    report = gather("headline")
    assert cell(report, "x", "AP").reason == "one class"
    assert note(report, "x") == "one class"


@pytest.mark.parametrize(("failure", "word"), [(kind, word) for kind, word in FAILURES.items() if kind])
def test_why_there_is_no_number_is_said_in_every_format(gather: Gather, store: Path, failure: str, word: str) -> None:
    only_run(store, "mp-queries", 2)
    for path in store.glob("runs/shapes-panoptic-mp-first-*-s2-*/attempts/1/stage.json"):
        stage = json.loads(path.read_text()) | {"failure_class": failure, "detail": "the very message"}
        path.write_text(json.dumps(stage))
    said_everywhere(gather("components"), "mp-queries", word, "the very message")


def only_run(store: Path, row: str, seed: int) -> None:
    """Leave one run of a row in the suite's record."""
    path = store / "suites" / "components@mini.json"
    record = json.loads(path.read_text())
    chosen = next(each for each in record["rows"] if each["name"] == row)
    chosen["runs"] = [run for run in chosen["runs"] if run["seed"] == seed]
    path.write_text(json.dumps(record))


def test_a_record_that_cannot_be_read_is_said_in_every_format(gather: Gather, store: Path) -> None:
    only_run(store, "mp-queries", 2)
    for path in store.glob("runs/shapes-panoptic-mp-first-*-s2-*/attempts/1/stage.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"failure_class": "new-class"}))
    said_everywhere(gather("components"), "mp-queries", "unknown", "new-class")


def said_everywhere(report: SuiteReport, row: str, *words: str) -> None:
    """Every format has the words."""
    found = cell(report, row, "AP")
    assert (found.kind, found.has_number) == (Kind.MISSING, False)
    for word in words:
        assert escape.markdown(word) in render(report.table, "md")
        assert escape.latex(word) in render(report.table, "tex")
        assert word in render(report.table, "csv")
        assert word in render(report.table, "json")
        assert word in pages.suite_page(report, (), None)


@pytest.mark.parametrize(
    ("seed", "queued", "word"), [(2, False, "never launched"), (1, False, "not started"), (1, True, "queued")]
)
def test_what_was_not_begun_says_so(store: Path, seed: int, queued: bool, word: str) -> None:
    only_run(store, "guided", seed)
    opened = Store(store)
    (name,) = [
        row["runs"][0]["run_id"]
        for row in json.loads((store / "suites" / "components@mini.json").read_text())["rows"]
        if row["name"] == "guided"
    ]
    reader = Reader(opened, frozenset([name]) if queued else frozenset())
    found = cell(collect(records(opened, ["components"], "mini", None)[0], reader), "guided", "AP")
    assert found.kind is Kind.MISSING
    assert found.reason == f"seed {seed}: {word}"


def without(store: Path, pattern: str, metric: str) -> None:
    """The results of these runs have no such number."""
    for path in store.glob(f"runs/{pattern}/evals/*/result.json"):
        content = json.loads(path.read_text())
        content["metrics"][metric] = None
        path.write_text(json.dumps(content))


def test_a_cell_of_fewer_seeds_than_its_row_says_so_itself(gather: Gather, store: Path) -> None:
    """All three runs are done, but one has no AP: the row's n is 3, that of this cell and its pairs are not."""
    without(store, "shapes-panoptic-mp-every-n0.2-f0.2-s1-*", "AP")
    report = gather("headline")
    found, row = cell(report, "mp-former", "AP"), report.table.rows[1]
    assert (found.kind, found.n, found.planned, found.best) == (Kind.PARTIAL, 2, 3, False)
    assert found.reason.startswith("seed 1: AP has no value")
    assert text.seeds(row.cells) == "3"
    assert text.remark(found, row.cells) == "2 of 3 seeds"
    for form, shown in (("md", "(2 of 3 seeds)"), ("tex", r"\mpfremark{(2 of 3 seeds)}"), ("csv", "seed 1: AP has no")):
        assert shown.replace("{(", "{").replace(")}", "}") in render(report.table, form) or shown in render(
            report.table, form
        )


def test_a_difference_of_fewer_pairs_than_seeds_says_so(gather: Gather, store: Path) -> None:
    without(store, "shapes-panoptic-m2f-s1-*", "AP")
    report = gather("headline")
    found = cell(report, "mp-former", "AP")
    assert (found.kind, found.n, present(found.delta).n) == (Kind.VALUE, 3, 2)
    assert text.delta(found, report.table.columns[0]).endswith(", 2 pairs")
    assert ", 2 pairs)" in render(report.table, "md")


def test_names() -> None:
    assert suite_name("a", "mini", "shapes") == suite_name("a", "mini", None) == "a@mini"
    assert suite_name("a", "mini", "nuclei") == "a@mini+nuclei"
    assert suite_name("a", "paper", "coco") == "a@paper"
    assert suite_name("a", "paper", "ade20k") == "a@paper+ade20k"
    assert suite_name("a", "unknown", "x") == "a@unknown+x"
    assert grouped(["x", "x", "y"]) == (("x", 2), ("y", 1))


def test_the_jump_rate_of_runs_evaluated_before_it(gather: Gather) -> None:
    """The results of the fixture store do not have it: it is counted from ``layers.parquet``, where that was kept."""
    report = gather("headline", columns=["jump-rate", "jump-rate-late"])
    view = report.rows[0].done[0]
    table = layer_table.read(view.directory.evaluation(view.eval_id) / "layers.parquet")
    rates = jump_rates(table)
    once, late = report.table.rows[0].cells
    assert [value.value for value in once.values] == [rates.once]
    assert [value.value for value in late.values] == [rates.late]
    assert once.reason == "seeds 1, 2: jump rate was not measured"
