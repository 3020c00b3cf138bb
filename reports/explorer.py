"""The layer explorer: ``layer_masks/`` of one or two runs as one HTML page that needs no server and no network.

Each image's masks travel as COCO's run-length strings, deflated; the page inflates and decodes an image when it is
looked at, so that it opens at once however many there are. Two runs are aligned by ground-truth object, never by
query index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from analysis.failure_cases import aligned
from experiments.store.files import write_text
from experiments.store.run_dir import RunDir
from mpformer.runtime.errors import UserError, choices
from reports import jump_picture
from reports.escape import clean
from reports.mask_pictures import LayerMasks, deflate, picture_uri
from reports.pages import script_hash
from reports.render import TEMPLATES

LIMIT = 30 * 2**20
"""Largest page that is written, in bytes."""
PACKINGS = ((512, True), (320, True), (256, False))
"""Longest side of the images, and whether queries that end on no object are kept: from full to small, until it fits."""
SURE = 0.5
"""Score from which on a query is one that the page opens with."""
Records = dict[int, list[Mapping[str, Any] | None]]


@dataclass(frozen=True)
class Source:
    """One run's masks; ``label`` is how the page names it."""

    label: str
    masks: tuple[LayerMasks, ...]
    """What the evaluation kept, then what was computed later on request; the first that has an image counts."""

    @property
    def images(self) -> list[int]:
        """Ids of the images that have masks."""
        return list(dict.fromkeys(i for masks in self.masks for i in masks.images))

    def folder(self, image: int) -> LayerMasks | None:
        """Where an image's masks are."""
        return next((masks for masks in self.masks if image in masks.images), None)

    def read(self, image: int) -> Mapping[str, Any] | None:
        """An image's record, None if there is none or it is damaged."""
        masks = self.folder(image)
        return masks.read(image) if masks else None


@dataclass(frozen=True)
class Entry:
    """A line of the list: an object of an image, with each run's final query, its largest drop, where, and its score.

    The lists have one entry a run, None where no query of the run is matched to the object.
    """

    image: int
    object: int
    name: str
    query: list[int | None]
    drop: list[float | None]
    layer: list[int | None]
    score: list[float | None]

    @property
    def worst(self) -> float:
        """The largest drop of any run; −1 if none is known."""
        return max((drop for drop in self.drop if drop is not None), default=-1.0)


def first_shown(entries: Sequence[Entry]) -> int:
    """Which line the page opens with: the strongest difference between the runs' largest drops (of one run the largest
    drop) among objects that every run finds with a score of SURE; the first line where there is none.
    """
    sure = [n for n, e in enumerate(entries) if all(score is not None and score >= SURE for score in e.score)]
    known = [n for n in sure if None not in entries[n].drop]
    return max(known, key=lambda n: _difference(entries[n]), default=0)


def _difference(entry: Entry) -> float:
    drops = [drop for drop in entry.drop if drop is not None]
    return max(drops) - min(drops) if len(drops) > 1 else drops[0]


def build_explorer(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    images: Sequence[int] = (),
    worst: int | None = None,
    query: int | None = None,
    labels: Sequence[str] = (),
    back: str = "",
) -> Path:
    """Write the explorer of one or two runs to ``out`` and return it; ``back`` is the page that it links back to.

    ``run_dirs`` are run directories (or directories that hold ``layer_masks/``). ``images`` keeps these image ids,
    ``worst`` the images of the n most inconsistent objects, ``query`` lists only objects that end on this query.
    Raises UserError where a run kept no masks, an image or query is unknown, or the page would be larger than LIMIT.
    """
    if not 1 <= len(run_dirs) <= 2:
        raise UserError(f"the explorer shows one run or two side by side, not {len(run_dirs)}")
    names = [labels[i] if i < len(labels) else "" for i in range(len(run_dirs))]
    sources = [_source(path, name, bool(images)) for path, name in zip(run_dirs, names, strict=True)]
    records = _chosen_images(sources, images)
    entries = _chosen_entries(records, worst, query)
    kept = {entry.image for entry in entries} if worst is not None or query is not None else set(records)
    shown = {i: records[i] for i in records if i in kept}
    opening = _opening(sources, shown)
    pages = (_page(sources, shown, entries, opening, back, packing) for packing in PACKINGS)
    page = next((page for page in pages if len(page.encode()) <= LIMIT), "")
    if not page:
        page = _page(sources, shown, entries, opening, back, PACKINGS[-1])
        raise UserError(
            f"the page would be {len(page) / 2**20:.0f} MB, more than {LIMIT >> 20}; keep fewer images: --worst N "
            f"or --images ID,ID"
        )
    write_text(out, page)
    return out


def _source(path: Path, label: str, further: bool) -> Source:
    """The masks of a run's newest evaluation that has some; those of further images only if images are asked for."""
    folders = [path, *sorted(path.glob("evals/*"), key=_age, reverse=True)]
    names = ("layer_masks", "further_masks") if further else ("layer_masks",)
    found = ([LayerMasks(folder / name) for name in names if LayerMasks(folder / name).images] for folder in folders)
    masks = next((tuple(each) for each in found if each), ())
    if not masks:
        raise UserError(
            f"{path} has no layer masks: evaluate the run with evaluation.layer_mask_images above 0 (mpformer "
            f"launch … --set), or name images: --images ID,ID"
        )
    return Source(clean(label or _label(path)), masks)


def _opening(sources: Sequence[Source], records: Records) -> dict[str, Any] | None:
    """The picture of the jumps that the page opens with; None without layer tables."""
    by_run = [{i: found[which] for i, found in records.items()} for which in range(len(sources))]
    whole = [{i: record for i, record in mine.items() if record} for mine in by_run]
    pictures = {
        i: masks.folder / str(record["image"])
        for source, mine in zip(sources, whole, strict=True)
        for i, record in mine.items()
        if record.get("image") and (masks := source.folder(i))
    }
    folders = [source.masks[0].folder.parent for source in sources]
    labels = [source.label for source in sources]
    picture = jump_picture.of_evaluations(folders, labels, aligned(whole, pictures))
    return jump_picture.view(picture, strips=False) if picture else None


def _age(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # a link to nowhere
        return 0.0


def _label(path: Path) -> str:
    record = RunDir(path).sound_record()
    if record is None:
        return path.name
    return f"{record.row or path.name}, seed {'?' if record.seed is None else record.seed}"


def _chosen_images(sources: Sequence[Source], images: Sequence[int]) -> Records:
    """The records by image id, one a run, None where a run kept no masks of the image."""
    every = list(dict.fromkeys(i for source in sources for i in source.images))
    if unknown := [i for i in images if i not in every]:
        raise choices("image", unknown[0], every)
    chosen = list(images) or every
    return {i: [source.read(i) for source in sources] for i in chosen}


def _chosen_entries(records: Records, worst: int | None, query: int | None) -> list[Entry]:
    entries = [entry for i, by_run in records.items() for entry in _entries(i, by_run)]
    if query is not None:
        known = sorted({q for entry in entries for q in entry.query if q is not None})
        entries = [entry for entry in entries if query in entry.query]
        if not entries:
            raise choices("query that is matched to an object", query, known)
    entries.sort(key=lambda entry: (-entry.worst, entry.image, entry.object))
    return entries[:worst] if worst is not None else entries


def _entries(image_id: int, by_run: Sequence[Mapping[str, Any] | None]) -> list[Entry]:
    """One entry per object that a query of some run ends on."""
    finals = [_finals(record) if record else {} for record in by_run]
    names = {int(o["object"]): str(o["class_name"]) for record in by_run if record for o in record["objects"]}
    found = []
    for obj, name in names.items():
        queries = [final.get(obj) for final in finals]
        if any(q is not None for q in queries):
            worst = [_worst(record, q) for record, q in zip(by_run, queries, strict=True)]
            drops, layers, scores = ([w[k] for w in worst] for k in range(3))
            found.append(Entry(image_id, obj, name, queries, drops, layers, scores))  # type: ignore[arg-type]
    return found


def _finals(record: Mapping[str, Any]) -> dict[int, int]:
    """Object → the query that is matched to it at the last layer."""
    return {int(q["object"]): int(q["query"]) for q in record["layers"][-1]["queries"] if q["object"] >= 0}


def _worst(record: Mapping[str, Any] | None, query: int | None) -> tuple[float | None, int | None, float | None]:
    """(largest drop, the later of its two layers, score at the last layer) of a query."""
    if record is None or query is None:
        return None, None, None
    steps = [
        (layer["layer"], entry) for layer in record["layers"] for entry in layer["queries"] if entry["query"] == query
    ]
    known = [(1 - entry["iou_previous"], layer) for layer, entry in steps if entry["iou_previous"] is not None]
    drop, layer = max(known, default=(None, None))
    return drop, layer, float(steps[-1][1]["score"])


def pack(record: Mapping[str, Any], every: bool = True) -> dict[str, Any]:
    """A record in short keys, class names once: what the page's script reads. ``every``: queries without object too."""
    names: dict[str, int] = {}
    kept = {q["query"] for q in record["layers"][-1]["queries"] if every or q["object"] >= 0}
    layers = [[_pack_query(q, names) for q in layer["queries"] if q["query"] in kept] for layer in record["layers"]]
    objects = [
        [o["object"], names.setdefault(clean(o["class_name"]), len(names)), _counts(o["rle"])]
        for o in record["objects"]
    ]
    return {"h": record["height"], "w": record["width"], "names": list(names), "objects": objects, "layers": layers}


def _pack_query(entry: Mapping[str, Any], names: dict[str, int]) -> list[Any]:
    name = names.setdefault(clean(entry["class_name"]), len(names))
    previous = None if entry["iou_previous"] is None else round(float(entry["iou_previous"]), 4)
    return [entry["query"], name, round(float(entry["score"]), 4), entry["object"], previous, _counts(entry["rle"])]


def _counts(rle: Any) -> str:
    return str(rle["counts"] if isinstance(rle, dict) else rle)


def _picture(sources: Sequence[Source], by_run: Sequence[Mapping[str, Any] | None], longest: int) -> str:
    """The image from the first run that kept it."""
    for source, record in zip(sources, by_run, strict=True):
        masks = source.folder(int(record["image_id"])) if record else None
        if record and masks and record.get("image"):
            return picture_uri(masks.folder / str(record["image"]), longest=longest)
    return ""


def _page(
    sources: Sequence[Source],
    records: Records,
    entries: Sequence[Entry],
    opening: Mapping[str, Any] | None,
    back: str,
    packing: tuple[int, bool],
) -> str:
    longest, every = packing
    listed = [{"id": i, "file": _file(by_run)} for i, by_run in records.items()]
    index = {
        "runs": [source.label for source in sources],
        "images": listed,
        "entries": [asdict(entry) for entry in entries],
        "first": first_shown(entries),
    }
    chunks = [
        (i, deflate([pack(record, every) if record else None for record in by_run]), _picture(sources, by_run, longest))
        for i, by_run in records.items()
    ]
    return (
        _environment()
        .get_template("explorer.html.j2")
        .render(index=index, chunks=chunks, runs=[s.label for s in sources], opening=opening, back=back, every=every)
    )


def _file(by_run: Sequence[Mapping[str, Any] | None]) -> str:
    return next((clean(record.get("file", "")) for record in by_run if record), "")


@cache
def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "".join((TEMPLATES / name).read_text() for name in ("explorer.js", "jumps.js"))
    css = "".join((TEMPLATES / name).read_text() for name in ("explorer.css", "jumps.css"))
    env.globals.update(css=Markup(css), script=Markup(script), script_hash=script_hash(script))
    return env
