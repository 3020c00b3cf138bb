"""The figures: what is drawn is what was given, the files are reproducible, and the gallery follows its rule."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.container import BarContainer
from matplotlib.patches import PathPatch
from PIL import Image

from analysis import failure_cases, figures
from analysis.failure_cases import aligned
from analysis.masks import layer_mask_record
from analysis.matching import ImagePrediction
from analysis.statistics import bounded_interval, mean_interval
from analysis.style import JUMP, assigned, look, look_of, looks
from tests.support.present import present

LAYERS, QUERIES = 4, 6
ROWS = ("Mask2Former", "MP-Former (paper)")


def layer_frame(seeds: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (row, seed, layer, measure, np.nan if measure == "mIoU-L" and layer == 0 else rng.uniform(20, 90))
        for row in ROWS
        for seed in range(seeds)
        for layer in range(LAYERS)
        for measure in ("mIoU-L", "IoU-gt", "Util", "AP")
    ]
    return pd.DataFrame(rows, columns=["row", "seed", "layer", "measure", "value"])


def lines_of(axis) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axis.get_lines() if not line.get_label().startswith("_")}


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_bands_are_the_intervals_of_the_seeds() -> None:
    frame = layer_frame(3).query("measure == 'AP'")
    bands = figures.seed_bands(frame, "layer")
    one = frame.query("row == 'Mask2Former' and layer == 2")["value"].tolist()
    got = bands.query("row == 'Mask2Former' and layer == 2").iloc[0]
    assert got["mean"] == pytest.approx(np.mean(one))
    assert (got["low"], got["high"]) == pytest.approx(bounded_interval(one))
    loss = figures.seed_bands(frame.assign(measure="loss", value=frame["value"] * 9), "layer").iloc[0]
    first = frame.query("row == 'Mask2Former' and layer == 0")["value"] * 9
    assert (loss["low"], loss["high"]) == pytest.approx(mean_interval(first.tolist()))  # a loss has no upper end
    two = layer_frame(2).query("measure == 'AP'")
    assert figures.seed_bands(two, "layer")["low"].isna().all()


def test_consistency_stands_beside_quality() -> None:
    frame = layer_frame(3)
    figure = figures.per_layer_curves(frame)
    assert [axis.get_ylabel() for axis in figure.axes] == ["mIoU-L (%)", "IoU-gt (%)", "Util (%)", "AP (%)"]
    drawn = lines_of(figure.axes[3])["Mask2Former (n = 3)"]
    wanted = frame.query("row == 'Mask2Former' and measure == 'AP'").groupby("layer")["value"].mean()
    np.testing.assert_allclose(drawn, np.stack([wanted.index, wanted], 1))
    assert len(figure.axes[0].patches) == len(ROWS)  # bands
    assert lines_of(figure.axes[0])["Mask2Former (n = 3)"][0, 0] == 1  # there is no mIoU-L at layer 0
    assert texts_of(figure) == ["Mask2Former (n = 3)", "MP-Former (paper) (n = 3)"]


def test_one_seed_has_no_band() -> None:
    figure = figures.per_layer_curves(layer_frame(1))
    assert all(not axis.patches for axis in figure.axes)
    assert figure.legends[0].get_texts()[0].get_text() == "Mask2Former (n = 1)"


def test_a_mean_is_over_all_seeds_or_not_at_all() -> None:
    """Where one seed is behind, or was evaluated at other layers, its absence must not move the line."""
    frame = layer_frame(3)
    behind = (frame["seed"] == 2) & (frame["layer"] > 1)
    figure = figures.over_layers(frame[~behind], ["mIoU-L"])
    (axis,) = (a for a in figure.axes if a.get_visible())
    means = [line for line in axis.get_lines() if line.get_linewidth() > 1]
    assert all(np.max(line.get_xdata()) == 1 for line in means)
    thin = [line for line in axis.get_lines() if line.get_linewidth() < 1]
    assert len(thin) == 3 * len(ROWS)
    assert max(np.max(line.get_xdata()) for line in thin) == LAYERS - 1


def test_long_legends_stay_inside_the_figure() -> None:
    frame = layer_frame(3)
    frame["row"] = frame["row"] + ", a label of forty letters and more"
    figure = figures.per_layer_curves(frame)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_measure_that_is_missing_says_so() -> None:
    figure = figures.per_layer_curves(layer_frame(3).query("measure != 'AP'"))
    assert "not measured" in [text.get_text() for text in figure.axes[3].texts]


def test_rows_differ_in_colour_marker_and_dashes() -> None:
    for key in ("color", "marker"):
        assert len({look(i)[key] for i in range(7)}) == 7
    assert len({(str(look(i)["linestyle"]), look(i)["marker"]) for i in range(7)}) == 7


def test_long_training_curves_are_thinned_without_bias() -> None:
    frame = pd.DataFrame({"iteration": range(1, 1001), "value": np.arange(1000.0)})
    frame = frame.assign(row="A", seed=0, measure="loss")
    figure = figures.training_curves(frame, ["loss"])
    drawn = lines_of(figure.axes[0])["A (n = 1)"]
    assert len(drawn) <= 120
    assert drawn[0].tolist() == [9, 4]
    assert drawn[-1, 0] == 1000


def test_schedules_are_marked_at_their_ends() -> None:
    rows = [
        (row, name, 0, iteration, iteration / 100)
        for row in ROWS
        for name, end in (("full", 1000), ("half", 500))
        for iteration in range(100, end + 1, 100)
    ]
    figure = figures.schedule_curves(pd.DataFrame(rows, columns=["row", "schedule", "seed", "iteration", "value"]))
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["10.0", "10.0", "5.0", "5.0"]
    assert set(lines_of(figure.axes[0])) == {f"{row}, {name} (n = 1)" for row in ROWS for name in ("full", "half")}


def test_the_forest_is_the_paired_interval_and_every_seed() -> None:
    lines = [("A", seed, value) for seed, value in enumerate((1.0, 2.0, 4.5))] + [("B", 0, -1.0), ("B", 1, -2.0)]
    figure = figures.forest(pd.DataFrame(lines, columns=["row", "seed", "value"]), "AP", "Mask2Former")
    (axis,) = figure.axes
    drawn: Any = axis.collections
    _zero, intervals, seeds, means = drawn
    first, none = intervals.get_segments()
    assert first[:, 0].tolist() == pytest.approx(bounded_interval([1.0, 2.0, 4.5], -100.0, 100.0))
    assert not len(none)  # no interval of two seeds
    assert [seeds.get_offsets()[:, 0].tolist(), means.get_offsets()[:, 0].tolist()] == [
        [1.0, 2.0, 4.5, -1.0, -2.0],
        [2.5, -1.5],
    ]
    assert [text.get_text() for text in axis.texts] == ["A", "+2.5 (−2.0 … +7.0), n = 3", "B", "−1.5, n = 2"]
    assert 96 * figure.get_figwidth() < 390 - 36, "CSS pixels of a phone's page: shown at its own size"
    assert axis.get_xlabel() == "AP: difference to Mask2Former (points)"


def test_a_score_against_a_number() -> None:
    lines = [("toggles.point_noise", "MP", seed, x, 10 * x + seed) for seed in range(3) for x in (0.0, 0.2, 0.4)]
    frame = pd.DataFrame(lines, columns=["key", "row", "seed", "number", "value"])
    (axis,) = figures.against_number(frame, "AP").axes
    np.testing.assert_allclose(lines_of(axis)["MP (n = 3)"], [[0.0, 1.0], [0.2, 3.0], [0.4, 5.0]])
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("point noise", "AP (%)")


def test_colour_is_the_method_and_dash_the_schedule() -> None:
    frame = layer_frame(3)
    given = {ROWS[0]: look_of(3), ROWS[1]: look_of(3, 1)}
    with assigned(given):
        figure = figures.over_layers(frame, ["AP"])
    first, second = (line for line in figure.axes[0].get_lines() if line.get_linewidth() > 1)
    assert first.get_color() == second.get_color() == look(3)["color"]
    assert first.get_linestyle() != second.get_linestyle()
    assert looks(ROWS)[ROWS[0]] == look(0)  # outside the block nothing is left


def test_methods_of_one_schedule_differ_in_grey_print_too() -> None:
    """However many points a curve has, its marker is there."""
    rng = np.random.default_rng(0)
    long = [(row, 0, i, measure, rng.random()) for row in ROWS for i in range(200) for measure in ("loss", "AP")]
    drops = [(row, layer, rng.random()) for row in ROWS for layer in (1, 2) for _ in range(100)]
    with assigned({row: look_of(i) for i, row in enumerate(ROWS)}):
        drawn = (
            figures.training_curves(pd.DataFrame(long, columns=["row", "seed", "iteration", "measure", "value"])),
            figures.drop_distribution(pd.DataFrame(drops, columns=["row", "layer", "drop"])),
            figures.per_layer_curves(layer_frame(3)),
        )
    for figure in drawn:
        entries = [(line.get_marker(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
        assert len(set(entries)) == len(ROWS)
        curves = [line for line in figure.axes[0].get_lines() if line.get_label() in texts_of(figure)]
        assert [(line.get_marker(), line.get_linestyle()) for line in curves] == entries
    boxes = [patch for patch in drawn[1].axes[1].patches if isinstance(patch, PathPatch)]
    assert len({box.get_hatch() for box in boxes}) == len(ROWS)


def test_transition_matrices_show_their_numbers() -> None:
    matrices = {row: np.full((LAYERS, LAYERS), 25.0 + i) for i, row in enumerate(ROWS)}
    figure = figures.transition_matrix(matrices)
    shown = [{text.get_text() for text in axis.texts} for axis in figure.axes[:2]]
    assert shown == [{"25"}, {"26"}]


def test_drop_distribution_counts_pairs() -> None:
    frame = pd.DataFrame({"row": "A", "layer": [1, 1, 2, 2], "drop": [0.1, 0.4, 0.9, np.nan]})
    figure = figures.drop_distribution(frame)
    line = lines_of(figure.axes[0])["A"]
    assert line[:, 0].tolist() == pytest.approx([0.1, 0.4, 0.9])
    assert line[:, 1].tolist() == pytest.approx([100, 200 / 3, 100 / 3])


def test_query_usage_is_sorted() -> None:
    figure = figures.query_usage({"A": np.array([1, 3, 0, 0])})
    (bars,) = figure.axes[0].containers
    assert isinstance(bars, BarContainer)
    assert [bar.get_height() for bar in bars] == [75, 25, 0, 0]
    assert "2 of 4 used, effective 1.8" in figure.axes[0].get_title(loc="left")


def test_files_are_reproducible(tmp_path: Path) -> None:
    frame = layer_frame(3).query("measure == 'AP'").reset_index(drop=True)
    first = figures.save(figures.over_layers(frame, ["AP"]), frame, tmp_path / "a" / "layers")
    second = figures.save(figures.over_layers(frame, ["AP"]), frame, tmp_path / "b" / "layers")
    assert [path.suffix for path in first] == [".svg", ".pdf", ".png", ".csv"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.suffix
    ElementTree.parse(first[0])
    pd.testing.assert_frame_equal(pd.read_csv(first[3]), frame, rtol=1e-5)


def test_style_does_not_leak() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.query_usage({"A": np.array([1, 2])})
    assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------ gallery


def scene(image: int) -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:12, 4 + image : 16 + image] = True
    masks[1, 20:28, 8:24] = True
    return masks, torch.tensor([0, 1])


def run(jump: dict[tuple[int, int], int], first_query: int, images: int = 3) -> dict[int, dict]:
    """Query first_query + m paints object m at every layer, except that (image, object) jumps away at one layer.

    Jumping away, it is matched to nothing: another query paints what it left.
    """
    records = {}
    for image in range(images):
        masks, labels = scene(image)
        cells = torch.nn.functional.avg_pool2d(masks[None].float(), 4)[0] >= 0.5
        logits = torch.full((LAYERS, QUERIES, 8, 8), -8.0)
        classes = torch.zeros(LAYERS, QUERIES, 3)
        for obj in range(2):
            query = first_query + obj
            logits[:, query] = cells[obj] * 16.0 - 8
            classes[:, query, obj] = 5
            if (image, obj) in jump:
                layer = jump[image, obj]
                logits[layer, query] = cells[obj].roll(4, 0) * 16.0 - 8
                logits[layer, 3] = cells[obj] * 16.0 - 8
                classes[layer, 3, obj] = 5
        prediction = ImagePrediction.from_masks(logits, classes, (32, 32))
        records[image] = layer_mask_record(
            image, prediction, masks, labels, class_names=["disc", "ring"], things=[True, True]
        )
    return records


def test_gallery_takes_the_worst_of_each_run_aligned_by_object() -> None:
    first, second = run({(0, 1): 2}, first_query=0), run({(2, 0): 1}, first_query=4)
    cases = failure_cases.gallery_cases(aligned([first, second]), each=1)
    assert [(c.chosen_by, c.image_id, c.object, c.drop) for c in cases] == [(0, 0, 1, 1.0), (1, 2, 0, 1.0)]
    # The jump away at layer 2 is a drop to layer 2 (and back to layer 3); the first of the ties is taken.
    assert cases[0].layer == 2
    assert [present(track).query for track in cases[0].tracks] == [1, 5]
    assert [present(track).query for track in cases[1].tracks] == [0, 4]
    assert [step.iou_previous for step in present(cases[0].tracks[0]).steps] == [None, 1, 0, 0]
    # The truth is the object that the query ends on, also where it is matched to nothing.
    assert first[0]["layers"][2]["queries"][1]["object"] == -1
    assert [step.iou_gt for step in present(cases[0].tracks[0]).steps] == [1, 1, 0, 1]
    np.testing.assert_array_equal(cases[0].truth, present(cases[0].tracks[1]).steps[0].mask)
    data = failure_cases.cases_frame(cases, ["A", "B"])
    assert data["layer"].tolist() == [1, 2, 3] * 4
    assert data["run"].tolist() == (["A"] * 3 + ["B"] * 3) * 2
    assert data["chosen_by"].tolist() == ["A"] * 6 + ["B"] * 6


def test_gallery_is_drawn_from_layer_1_on_and_red_is_a_jump_alone(tmp_path: Path) -> None:
    runs = [run({(0, 1): 1}, 0), run({}, 4)]
    Image.fromarray(np.full((32, 32, 3), 90, dtype=np.uint8)).save(tmp_path / "0.png")
    cases = failure_cases.gallery_cases(aligned(runs, {0: tmp_path / "0.png"}), each=1)
    figure = figures.failure_gallery(cases, ["A", "B"])
    framed = [axis for axis in figure.axes if axis.spines["left"].get_edgecolor() == to_rgba(JUMP)]
    assert [axis.get_title(loc="center").split(",")[0] for axis in framed] == ["layer 1", "layer 2"]
    first = [axis.get_title(loc="center").split(",")[0] for axis in figure.axes[:3]]
    assert first == ["layer 1", "layer 2", "layer 3"]  # the final prediction right
    left, top, right, bottom = cases[0].box  # cropped to the object: 2 x 4 cells of 8 x 8
    assert figure.axes[0].get_xlim() == (left, right) == (0, 8)
    assert figure.axes[0].get_ylim() == (bottom, top) == (8, 0)
    assert {text.get_text() for text in figure.texts} == {"A", "B"}
    assert (
        figures.save(figure, failure_cases.cases_frame(cases, ["A", "B"]), tmp_path / "gallery")[2].stat().st_size
        > 5000
    )
    with pytest.raises(ValueError, match="no case"):
        figures.failure_gallery([], ["A"])


def test_a_run_that_never_changes_has_no_case() -> None:
    assert failure_cases.gallery_cases(aligned([run({}, 0)])) == []


def test_one_case_an_image_and_one_run_an_object() -> None:
    """Two objects of an image jump: the first run shows one, the second run the other."""
    both = run({(1, 0): 1, (1, 1): 1}, 0)
    assert [case.object for case in failure_cases.gallery_cases(aligned([both]))] == [0]
    assert [(case.object, case.chosen_by) for case in failure_cases.gallery_cases(aligned([both, both]))] == [
        (0, 0),
        (1, 1),
    ]


def test_images_that_only_one_run_kept_are_left_out() -> None:
    first, second = run({(0, 1): 2, (1, 1): 2}, 0), run({}, 4)
    del second[0]
    assert [case.image_id for case in failure_cases.gallery_cases(aligned([first, second]))] == [1]


def test_unsure_queries_are_no_case() -> None:
    records = run({(0, 1): 2}, 0)
    for query in records[0]["layers"][-1]["queries"]:
        query["score"] = 0.4
    assert failure_cases.gallery_cases(aligned([records])) == []


def test_an_object_that_a_run_did_not_match() -> None:
    first, second = run({(0, 1): 2}, 0), run({}, 4)
    for query in second[0]["layers"][-1]["queries"]:
        query["object"] = -1
    cases = failure_cases.gallery_cases(aligned([first, second]), each=1)
    assert cases[0].tracks[1] is None
    figure = figures.failure_gallery(cases[:1], ["A", "B"])
    assert any("no query matched" in text.get_text() for axis in figure.axes for text in axis.texts)


@pytest.mark.parametrize(
    ("layer", "layers", "shown"), [(1, 4, [0, 1, 3]), (2, 4, [1, 2, 3]), (3, 4, [1, 2, 3]), (1, 2, [0, 1])]
)
def test_layers_shown(layer: int, layers: int, shown: list[int]) -> None:
    assert failure_cases.layers_shown(layer, layers) == shown


def test_boundary_runs_along_cell_edges() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 1:3] = True
    segments = failure_cases.boundary(mask)
    assert len(segments) == 6
    assert ((1, 1), (2, 1)) in segments
    assert ((3, 1), (3, 2)) in segments
    assert len(failure_cases.boundary(np.ones((3, 4), dtype=bool))) == 14
