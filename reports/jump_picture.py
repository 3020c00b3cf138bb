"""The picture that opens a suite's page and the layer explorer: film strips of one object, chosen by rule, over
barcodes of all objects (:mod:`analysis.film_strip`). In the page one drags through the layers, and clicks a line to
load its strip.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from analysis import layer_table
from analysis.failure_cases import Aligned, Case, Track
from analysis.film_strip import Barcode, RunJumps, barcode, choose, claim, layer_name, on_target, rule
from analysis.jumps import THRESHOLD, jump_curve, jump_rates, jumps
from experiments.store.run_dir import RunDir
from reports import mask_pictures
from reports.collect import RowRuns, SuiteReport, number
from reports.escape import clean
from reports.figures import BANDS, Plan, as_figure_text, label, left_out, pairs, row_labels, shown_rows
from reports.mask_pictures import deflate, fill_path, outline_path, picture_uri, view_box
from reports.runs import RunView

PACKED = 6 * 2**20
"""Bytes of strips that a page holds at most; lines of further images say that they are in the explorer."""
THRESHOLDS = tuple(n / 20 for n in range(1, 20))


@dataclass(frozen=True)
class JumpPicture:
    """What is drawn: the runs with their rates, the chosen object and its opposite, and where the others' masks are."""

    runs: tuple[RunJumps, ...]
    found: Aligned | None
    images: int
    """Validation images with an object."""
    ids: tuple[str, ...]
    """The runs' ids."""

    @property
    def cases(self) -> tuple[Case, ...]:
        """The chosen object and the opposite extreme; empty where no masks are stored or no object meets the rule."""
        return choose(self.found) if self.found else ()

    def caption(self) -> str:
        """How everything was chosen and counted."""
        stored = len(self.found.tracks) if self.found else 0
        masks = (
            f"Masks are stored of {stored} of {self.images} images (evaluation.layer_mask_images); objects are chosen "
            "among those. "
        )
        chosen = f"Seed {self.runs[0].seed}. {masks}{rule(len(self.runs), met=bool(self.cases))}"
        return (
            f"{chosen} Red: a jump, IoU with the mask before < {THRESHOLD}. Barcodes: every matched object of the "
            "validation images a line, each run sorted by itself, those that jump latest on top."
        )


def of_suite(report: SuiteReport, found: Aligned | None, views: Sequence[RunView]) -> JumpPicture | None:
    """The picture of the baseline and the last row that has masks, or, where none has, layer tables at least.

    ``views`` are the two runs whose masks are ``found``. None without two runs with layer tables.
    """
    for (base, theirs), (row, mine) in pairs(report):
        wanted = not views or [theirs, mine] == list(views)
        if wanted and all(view.layer_table is not None and len(view.layer_table) for view in (theirs, mine)):
            runs = (_run(base, theirs), _run(row, mine))
            return JumpPicture(runs, found, len(set(runs[0].table["image_id"])), (theirs.run_id, mine.run_id))
    return None


def of_evaluations(folders: Sequence[Path], labels: Sequence[str], found: Aligned) -> JumpPicture | None:
    """The picture of one run or two, from the directories of their evaluations; None where one has no layer table."""
    try:
        tables = [layer_table.read(folder / "layers.parquet") for folder in folders]
    except (OSError, ValueError):
        return None
    if not all(len(table) for table in tables):
        return None
    directories = [folder.parent.parent for folder in folders]
    known = [RunDir(directory).sound_record() for directory in directories]
    seeds = [record.seed or 0 if record is not None else 0 for record in known]
    runs = tuple(
        RunJumps(name, seed, table, {seed: jump_rates(table).once}, {seed: jump_rates(table).late})
        for name, seed, table in zip(labels, seeds, tables, strict=True)
    )
    ids = tuple(directory.name for directory in directories)
    return JumpPicture(runs, found, len(set(tables[0]["image_id"])), ids)


def _run(row: RowRuns, view: RunView) -> RunJumps:
    rates = (
        {each.seed: number(each, key, each.result) for each in row.done} for key in ("jump-rate", "jump-rate-late")
    )
    once, late = ({seed: rate for seed, rate in by_seed.items() if rate is not None} for by_seed in rates)
    assert view.layer_table is not None
    return RunJumps(clean(row.label), view.seed, view.layer_table, once, late)


# ------------------------------------------------------------------ as a figure


def plans(report: SuiteReport, picture: JumpPicture | None) -> Iterator[Plan]:
    """The picture as a figure with its numbers, and the jump rate at other thresholds."""
    if picture:
        yield _figure(picture)
    yield _thresholds(report)


def _figure(picture: JumpPicture) -> Plan:
    import pandas as pd

    cases = [as_figure_text(case) for case in picture.cases]
    lines = [*_rates(picture), *_patterns(picture), *_strips(picture.runs, cases)]
    data = pd.DataFrame(lines, columns=["row", "seed", "measure", "value"])

    def draw() -> Any:
        from dataclasses import replace

        from analysis.film_strip import jump_figure

        runs = [replace(run, name=label(run.name)) for run in picture.runs]
        return jump_figure(runs, cases, picture.caption())

    return Plan("jumps", claim(picture.runs)[0], picture.caption(), data, draw, file_alone=True)


def _rates(picture: JumpPicture) -> list[tuple[Any, ...]]:
    return [
        (run.name, seed, measure, value)
        for run in picture.runs
        for measure, by_seed in (("jump-rate", run.once), ("jump-rate-late", run.late))
        for seed, value in by_seed.items()
    ]


def _patterns(picture: JumpPicture) -> list[tuple[Any, ...]]:
    """How many objects jump at exactly these steps: the barcode, counted."""
    lines: list[tuple[Any, ...]] = []
    for run in picture.runs:
        counts: dict[str, int] = {}
        for pattern in _steps(run):
            counts[pattern] = counts.get(pattern, 0) + 1
        lines += [(run.name, run.seed, f"objects that jump at {pattern}", n) for pattern, n in sorted(counts.items())]
    return lines


def _strips(runs: Sequence[RunJumps], cases: Sequence[Case]) -> list[tuple[Any, ...]]:
    return [
        (run.name, run.seed, f"image {case.image_id} object {case.object} layer {step.layer}: on target", step.iou_gt)
        for case in cases
        for run, track in zip(runs, case.tracks, strict=True)
        for step in (track.steps if track else ())
    ]


def _steps(run: RunJumps) -> list[str]:
    """By object, in the table's order: ``110000`` for one that jumps at steps 1 and 2 of 6."""
    return ["".join("1" if jumped else "0" for jumped in one) for one in jumps(run.table).T]


def _thresholds(report: SuiteReport) -> Plan:
    import pandas as pd

    labels = row_labels(shown_rows(report))
    lines = [
        (labels[row.name], view.seed, threshold, measure, value)
        for row in shown_rows(report)
        for view in row.done
        if view.layer_table is not None
        for threshold, rates in zip(THRESHOLDS, jump_curve(view.layer_table, THRESHOLDS), strict=True)
        for measure, value in (("jump-rate", rates.once), ("jump-rate-late", rates.late))
    ]
    data = pd.DataFrame(lines, columns=["row", "seed", "threshold", "measure", "value"]).dropna()

    def draw() -> Any:
        from analysis.figures import over_thresholds

        return over_thresholds(data, [text for text in labels.values() if text in set(data["row"])])

    caption = (
        "What hangs on the threshold of a jump: share of the objects whose mask shares less than this with the one "
        f"before, at any step (left) and after layer 1 (right). The jump rate is the value at {THRESHOLD}. "
        f"{BANDS}{left_out(report)}"
    )
    return Plan("jump-thresholds", "Jump rate at other thresholds", caption, data, draw)


# ------------------------------------------------------------------ in a page


def view(picture: JumpPicture, *, strips: bool) -> dict[str, Any]:
    """What the template shows; ``strips`` embeds the strips of all objects with masks."""
    cases, codes = picture.cases, [barcode(run.table) for run in picture.runs]
    title, ground = claim(picture.runs)
    layers = picture.runs[0].table.layers
    stored = _stored(picture.found)
    index = {
        "lines": [_lines(run, code) for run, code in zip(picture.runs, codes, strict=True)],
        "hint": f"To see it: mpformer visualize {' '.join(picture.ids)} --images ID",
        "kept": f"{len(picture.found.tracks) if picture.found else 0} of {picture.images} images keep theirs",
    }
    packed = _packed(picture.found) if strips and picture.found else ()
    return {
        "title": title,
        "ground": ground,
        "caption": picture.caption(),
        "names": [run.name for run in picture.runs],
        "layers": [layer_name(layer) for layer in range(layers)],
        "cases": [_case(case, number) for number, case in enumerate(cases)],
        "unmet": picture.found is not None and not cases,
        "runs": [_barcode(run, code, stored) for run, code in zip(picture.runs, codes, strict=True)],
        "index": deflate(index),
        "strips": [(image, deflate(content)) for image, content in packed],
    }


def _case(case: Case, number: int) -> dict[str, Any]:
    identifier = f"jump-picture-{number}"
    tiles = [
        [
            (mask_pictures.tile(step, case, identifier, which), step.jumps, on_target(step).removeprefix("on target "))
            for step in (track.steps if track else ())
        ]
        for which, track in enumerate(case.tracks)
    ]  # fmt: skip
    definition = mask_pictures.picture_definition(case, identifier)
    return {"case": case, "name": clean(case.class_name), "tiles": tiles, "definition": definition}


def _stored(found: Aligned | None) -> set[tuple[int, int]]:
    """(image, object) of what a strip can be shown of: some run's final query is known."""
    by_image = found.tracks.items() if found else ()
    return {(image, obj) for image, runs in by_image for tracks in runs for obj in tracks}


def _objects(run: RunJumps) -> list[tuple[int, int]]:
    ids, objects = run.table.grid("image_id")[-1], run.table.grid("object")[-1]
    return list(zip(ids.tolist(), objects.tolist(), strict=True))


def _lines(run: RunJumps, code: Barcode) -> list[list[Any]]:
    objects, steps = _objects(run), _steps(run)
    return [[*objects[place], steps[place]] for place in code.order.tolist()]


def _barcode(run: RunJumps, code: Barcode, stored: set[tuple[int, int]]) -> dict[str, Any]:
    objects = _objects(run)
    kept = [line for line, place in enumerate(code.order.tolist()) if objects[place] in stored]
    height = max(1, len(code.order))
    return {
        "name": run.name,
        "steps": [f"{i - 1}→{i}" for i in range(1, run.table.layers)],
        "image": _png(code),
        "objects": len(code.order),
        "marks": Markup("".join(f"M0 {100 * (line + 0.5) / height:.2f}h1" for line in kept)),
        "once": run.rate(),
        "late": run.rate(late=True),
    }


def _png(code: Barcode) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(code.pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _packed(found: Aligned) -> list[tuple[int, Mapping[str, Any]]]:
    """By image, while they fit: its picture, and its objects' strips as SVG paths."""
    packed: list[tuple[int, Mapping[str, Any]]] = []
    size = 0
    for image in found.tracks:
        objects = sorted({obj for tracks in found.tracks[image] for obj in tracks})
        content = {
            "picture": picture_uri(found.pictures.get(image)),
            "objects": {obj: _strip(found.case(image, obj)) for obj in objects},
        }
        size += len(str(content)) // 3  # what it is about after deflating
        if size > PACKED:
            break
        packed.append((image, content))
    return packed


def _strip(case: Case) -> dict[str, Any]:
    return {
        "name": clean(case.class_name),
        "box": view_box(case),
        "size": [case.truth.shape[1], case.truth.shape[0]],
        "truth": outline_path(case.truth),
        "runs": [_track(track) for track in case.tracks],
    }


def _track(track: Track | None) -> dict[str, Any] | None:
    if track is None:
        return None
    steps = [[fill_path(s.mask), int(s.jumps), on_target(s).removeprefix("on target ")] for s in track.steps]
    return {"query": track.query, "steps": steps}
