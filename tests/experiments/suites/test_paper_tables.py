"""The suites of the paper: which there are, at both scales, and which published numbers are attached to their rows."""

import inspect
from pathlib import Path

import pytest

from experiments.suites import catalogue, planning
from experiments.suites.planning import Request
from experiments.suites.rows import Suite
from mpformer.config.schema import Config, ShapesConfig
from mpformer.runtime.errors import UserError
from reports import caption, definitions, paper_numbers

TASKS = ("instance", "panoptic", "semantic")
ON_COCO = ("components", "guided-layers", "noise-type", "point-noise", "flip-noise", "mp-groups", "class-embedding",
           "query-position", "schedule", "consistency", "overhead", "headline")  # fmt: skip
OF_DATASETS = ("coco-instance", "coco-panoptic", *(f"{d}-{t}" for d in ("ade20k", "cityscapes") for t in TASKS))
NAMES = (*ON_COCO, *OF_DATASETS, "convergence", "released", "stress")
ON_NUCLEI = {"headline", "components", "guided-layers", "noise-type", "mp-groups", "convergence", "overhead"}
SUITES = list(catalogue.all_suites().values())


def config_of(suite: Suite, row: str, scale: str, dataset: str) -> Config:
    (changes,) = (one.changes for one in suite.rows(scale, dataset) if one.name == row)
    return suite.base(scale, dataset).replace(dict(changes))


def test_every_suite_of_the_paper_is_there() -> None:
    assert set(NAMES) == set(catalogue.all_suites())


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_the_rows_are_the_same_at_both_scales(suite: Suite) -> None:
    paper, mini = suite.rows("paper", suite.datasets("paper")[0]), suite.rows("mini", "shapes")
    assert [row.name for row in paper] == [row.name for row in mini]
    assert [row.baseline for row in paper] == [row.baseline for row in mini]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_mini_has_as_many_backbones_as_the_paper(suite: Suite) -> None:
    if suite.name == "released":  # its rows at mini say that nobody released anything for it
        return
    kinds = []
    for scale, dataset in (("paper", suite.datasets("paper")[0]), ("mini", "shapes")):
        rows = suite.rows(scale, dataset)
        kinds.append([config_of(suite, row.name, scale, dataset).model.backbone.kind for row in rows])
    assert kinds[0] == kinds[1]
    assert set(kinds[0]) == ({"resnet", "swin"} if suite.name in (*OF_DATASETS, "convergence") else {"resnet"})


@pytest.mark.parametrize("name", ON_COCO)
def test_ablations_are_on_coco_instance_with_r50_and_12_epochs(name: str) -> None:
    suite = catalogue.find(name)
    (dataset,) = suite.datasets("paper")
    base = suite.base("paper", dataset)
    assert (dataset, base.dataset.task, base.schedule.max_iter, base.schedule.batch_size) == (
        "coco", "instance", 88500, 16,
    )  # fmt: skip
    assert (base.model.backbone.kind, getattr(base.model.backbone, "depth", None)) == ("resnet", 50)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_comparison_holds_position_and_schedule_equal(suite: Suite) -> None:
    """Unless the suite is about them, or about released files, which are as they are."""
    if suite.name in ("query-position", "schedule", "convergence", "released"):
        return
    dataset = suite.datasets("paper")[0]
    for row in suite.rows("paper", dataset):
        mine = config_of(suite, row.name, "paper", dataset)
        other = config_of(suite, row.baseline or suite.baseline, "paper", dataset)
        assert mine.schedule == other.schedule
        assert mine.toggles.query_position == other.toggles.query_position
        assert mine.model == other.model


def test_convergence_runs_have_schedules_of_their_own_to_the_end() -> None:
    """Half the length is not a full-length run stopped: the learning rate falls to the end of its own schedule."""
    suite = catalogue.find("convergence")
    for scale, dataset in (("paper", "ade20k"), ("mini", "shapes")):
        for backbone in ("r50", "swin-l"):
            full, half = (config_of(suite, f"mp-former,{backbone}-{n}k", scale, dataset) for n in (160, 80))
            assert half.schedule.max_iter * 2 == full.schedule.max_iter
            assert half.replace({"schedule": full.schedule.model_dump()}) == full
            assert all(step < half.schedule.max_iter for step in half.schedule.steps)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_suite_is_short_and_says_which_table_it_stands_for(suite: Suite) -> None:
    assert len(inspect.getsource(suite.make).splitlines()) <= 25
    assert suite.description
    known = {"coco-instance": "Table 7"}
    assert known.get(suite.name, "unknown") in suite.paper_table


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_where_a_suite_does_not_run_it_says_why(suite: Suite, tmp_path: Path) -> None:
    """On nuclei run the suites to which one class and no stuff mean something."""
    if suite.name in ON_NUCLEI:
        assert not suite.why_not("nuclei")
        left_out = [row.name for row in suite.rows("mini", "nuclei") if row.not_applicable]
        assert left_out == (["mp-flip"] if suite.name == "components" else [])
    if why := suite.why_not("nuclei"):
        with pytest.raises(UserError, match="does not apply on nuclei: ") as error:
            planning.make(Request(suite.name, "mini", "nuclei"), tmp_path)
        assert why in str(error.value)


def rows_at_paper() -> list[tuple[str, str, Config]]:
    return [
        (suite.name, row.name, config_of(suite, row.name, "paper", dataset))
        for suite in SUITES
        for dataset in suite.datasets("paper")
        for row in suite.rows("paper", dataset)
    ]


def setting(config: Config) -> paper_numbers.Setting:
    tree = config.model_dump()
    name = config.dataset.name
    length = paper_numbers.schedule_name(name, tree["schedule"])
    return paper_numbers.Setting(
        "paper", name, config.dataset.task, caption.backbone(tree["model"]["backbone"]), length
    )


def test_every_published_number_is_attached_to_a_row() -> None:
    """Those of a metric that is computed here, a backbone that a suite has, and a stated setting."""
    computed = {"AP", "AP50", "AP75", "APs", "APm", "APl", "PQ", "PQ_th", "PQ_st", "mIoU"}
    columns = {suite.name: suite.columns for suite in SUITES}
    shown = {(n, s.dataset, s.task, s.backbone, s.schedule, paper_numbers.family(c.toggles.model_dump()))
             for n, _, c in rows_at_paper() for s in [setting(c)]}  # fmt: skip
    missing, attached = [], 0
    for number in paper_numbers.read():
        stated = {number.task, number.backbone, number.schedule}.isdisjoint(paper_numbers.NOT_STATED)
        usable = number.metric in computed and number.variant in paper_numbers.COMPARABLE_VARIANTS
        if not (stated and usable) or number.backbone == "R101":
            continue
        key = (number.dataset, number.task, number.backbone, number.schedule, number.row)
        suites = [name for name, *rest in shown if tuple(rest) == key and number.metric in columns[name]]
        attached += bool(suites)
        missing += [] if suites else [f"line {number.line}: {number.where}"]
    assert not missing
    assert attached > 50


def test_the_papers_ap_at_12_epochs_stands_beside_its_row() -> None:
    (number,) = (n for n in paper_numbers.read() if n.value == 40.15)
    config = config_of(catalogue.find("coco-instance"), "mp-former,r50-12ep", "paper", "coco")
    assert paper_numbers.difference_of_settings(setting(config), number) == ""
    assert paper_numbers.family(config.toggles.model_dump()) == number.row


def test_a_report_on_cityscapes_says_whose_numbers_they_are() -> None:
    for column in ("AP", "AP50", "PQ", "mIoU"):
        usual, ours = (definitions.columns([column], dataset=name)[0] for name in ("coco", "cityscapes"))
        assert "Cityscapes' " in ours.definition
        assert usual.definition == definitions.COLUMNS[column].definition != ours.definition


def test_released_rows_train_nothing_and_name_a_file_each() -> None:
    suite = catalogue.find("released")
    files = set()
    for dataset in suite.datasets("paper"):
        for row in suite.rows("paper", dataset):
            config = config_of(suite, row.name, "paper", dataset)
            assert config.schedule.evaluation_only
            files.add(config.model.init_weights)
    assert len(files) == 17  # Mask2Former's of four, six and six settings, and MP-Former's
    assert "mp-former_coco_instance_r50.pkl" in files


def test_stress_is_headline_on_the_images_that_the_parameters_draw_by_default() -> None:
    suite = catalogue.find("stress")
    drawn = suite.base("mini", "shapes").dataset.shapes
    assert drawn is not None
    light = catalogue.find("headline").base("mini", "shapes").dataset.shapes
    assert light is not None
    assert drawn == ShapesConfig(side=light.side, solids=light.solids)
    assert sum(value == 0 for value in light.model_dump(exclude={"seed"}).values()) == 7
    assert all("toggles" in key for row in suite.rows("mini", "shapes") for key in row.changes)
    assert [name for name in ("shapes", "nuclei", "coco") if suite.why_not(name)] == ["nuclei", "coco"]
