"""The picture that explains it: which object it shows, what its title may say, and what is drawn."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from analysis import film_strip
from analysis.failure_cases import aligned
from analysis.film_strip import RunJumps, barcode, choose, claim, jump_figure
from analysis.jumps import jump_rates, jumps
from analysis.style import JUMP
from tests.analysis.test_figures import LAYERS, run
from tests.analysis.test_jumps import table_of
from tests.support.present import present

NAN = float("nan")


def sure(records: dict[int, dict]) -> dict[int, dict]:
    for record in records.values():
        for query in record["layers"][-1]["queries"]:
            query["score"] = 0.9
    return records


def test_the_object_with_the_largest_difference_and_beside_it_the_smallest() -> None:
    # object 1 of image 0 jumps away and back in the first run; object 0 of image 2 in the second
    first, second = sure(run({(0, 1): 2}, 0)), sure(run({(2, 0): 1}, 4))
    chosen, opposite = choose(aligned([first, second]))
    assert (chosen.image_id, chosen.object, [present(track).jumps for track in chosen.tracks]) == (0, 1, [2, 0])
    assert (opposite.image_id, opposite.object, [present(track).jumps for track in opposite.tracks]) == (2, 0, [0, 2])
    flipped = choose(aligned([second, first]))
    assert [(case.image_id, case.object) for case in flipped] == [(2, 0), (0, 1)]
    (most, fewest) = choose(aligned([first]))
    assert [present(most.tracks[0]).jumps, present(fewest.tracks[0]).jumps] == [2, 0]


def test_ties_go_to_the_worst_step() -> None:
    first, second = sure(run({}, 0)), sure(run({}, 4))
    for query, iou in ((0, 0.8), (1, 0.6)):
        next(q for q in first[1]["layers"][2]["queries"] if q["query"] == query)["iou_previous"] = iou
    chosen, _ = choose(aligned([first, second]))
    assert (chosen.image_id, chosen.object) == (1, 1)


@pytest.mark.parametrize("what", ["unsure", "stuff", "small", "off target"])
def test_objects_that_do_not_qualify(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = sure(run({(0, 1): 2}, 0))
    if what == "unsure":
        records = run({(0, 1): 2}, 0)
        for record in records.values():
            for query in record["layers"][-1]["queries"]:
                query["score"] = 0.4
    if what == "stuff":
        for record in records.values():
            for obj in record["objects"]:
                obj["thing"] = False
    if what == "small":
        monkeypatch.setattr(film_strip, "AREA", 0.9)
    if what == "off target":
        empty = records[0]["layers"][-1]["queries"][5]["rle"]  # query 5 paints nothing
        for record in records.values():
            for query in record["layers"][-1]["queries"]:
                query["rle"] = empty
    assert choose(aligned([records])) == ()


def runs_of(first: list[float], second: list[float], objects: int = 40) -> list[RunJumps]:
    """Runs of which these shares of the objects jump, by seed."""
    made = []
    for name, rates in (("A", first), ("B", second)):
        ious = np.ones((3, objects))
        ious[1, : round(rates[0] / 100 * objects)] = 0.1
        table = table_of(ious)
        assert jump_rates(table).once == rates[0]
        made.append(RunJumps(name, 0, table, dict(enumerate(rates)), dict(enumerate(rates))))
    return made


def test_the_title_says_what_the_interval_allows() -> None:
    title, ground = claim(runs_of([50, 52, 51], [40, 41, 42]))
    assert title == "B has fewer masks that jump than A"
    assert "3 paired seeds" in ground
    assert claim(runs_of([40, 41, 42], [50, 52, 51]))[0] == "B has more masks that jump than A"
    title, ground = claim(runs_of([50, 30, 60], [40, 60, 30]))
    assert title == "A and B: no difference shown in how many masks jump"
    # below three seeds it is a statement on two checkpoints, and says so
    title, ground = claim(runs_of([80], [10]))
    assert title == "Of these two checkpoints, B has fewer masks that jump than A"
    assert "two checkpoints, not two methods" in ground
    assert claim(runs_of([50], [50]))[0] == "A and B: no difference shown in how many masks jump"
    assert claim(runs_of([50], [50])[:1])[0] == "A: 50 % of the objects’ masks jump on the way"


def test_rates_are_over_seeds_from_three_on() -> None:
    over_seeds = runs_of([50, 52, 51], [40])[0].rate()
    assert over_seeds.mean == 51
    assert over_seeds.interval.endswith("3 seeds")
    assert 0 <= over_seeds.low < 51 < over_seeds.high <= 100
    one = runs_of([50, 60], [40])[0].rate()
    assert one.mean == 50  # this checkpoint's, whose images the interval is over
    assert one.interval.endswith("images of this checkpoint")


def test_barcodes_hold_every_object_once_latest_jumps_first() -> None:
    ious = np.array([[0.2, 0.9, 0.9, NAN, 0.4], [0.9, 0.1, 0.9, NAN, 0.9]])
    table = table_of(ious)
    found = barcode(table)
    assert sorted(found.order.tolist()) == list(range(5))
    assert jumps(table)[:, found.order].T.tolist() == [
        [False, True],
        [True, False],
        [True, False],
        [False] * 2,
        [False] * 2,
    ]
    red = found.pixels[..., 0].astype(int) - found.pixels[..., 2] > 80
    assert red.tolist() == jumps(table)[:, found.order].T.tolist()
    few = barcode(table, most=2)
    assert (few.per_line, len(few.pixels)) == (3, 2)


def test_the_figure() -> None:
    cases = choose(aligned([sure(run({(0, 1): 2}, 0)), sure(run({(2, 0): 1}, 4))]))
    figure = jump_figure(runs_of([50], [40]), cases, "how it was chosen")
    texts = [text.get_text() for text in figure.texts]
    assert {"how it was chosen", "50 %", "40 %", "query 1", "query 5"} <= set(texts)
    tiles = figure.axes[:-2]
    assert len(tiles) == 2 * 2 * LAYERS
    framed = [tile for tile in tiles if tile.spines["left"].get_edgecolor() == to_rgba(JUMP)]
    assert len(framed) == 4  # away and back, in one run of each case; never a step of IoU 0.5 or more
    assert [tile.get_xlabel() for tile in tiles[:4]] == ["on target 100 %"] * 2 + ["on target 0 %", "on target 100 %"]
    sizes = [tile.get_position().width for tile in (tiles[0], tiles[-1])]
    assert sizes[1] < sizes[0] / 2  # the opposite extreme is smaller
    assert len(jump_figure(runs_of([50], [40]), ()).axes) == 2
