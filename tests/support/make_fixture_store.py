"""Writes the committed fixture runs: `python tests/support/make_fixture_store.py [DIRECTORY]`.

Deterministic; the numbers are invented and only shaped like real ones. Every state that a cell can have is in it:
`headline@mini` is complete, `components@mini` is half-finished and hostile, `headline@mini+nuclei` has one seed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from analysis import layer_table
from experiments.store.identity import eval_id, run_id
from mpformer.config.schema import Config

HERE = Path(__file__).parents[1] / "reports"
LAYERS = 6
SIDE, GRID = 128, 32
CREATED = 1795338000.0
NASTY = (
    "<script>alert(1)</script> \\input{/etc/passwd} ${PATH} | a_b #1 \x1b[31mred\x1b[0m {{ 7*7 }} `x` ](javascript:x)"
)
CLASSES = ("disc", "triangle", "square", "star", "worm", "ring", "stripes", "checks", "dots")

MASK2FORMER: dict[str, Any] = {}
PAPER = {"mp_queries": True, "guided_layers": "every", "point_noise": 0.2, "flip_noise": 0.2}


@dataclass(frozen=True)
class RowSpec:
    name: str
    label: str
    toggles: dict[str, Any]
    gain: float  # how much better than plain Mask2Former, in AP
    states: tuple[str, ...]  # one a seed


HEADLINE = (
    RowSpec("mask2former", "Mask2Former", MASK2FORMER, 0.0, ("done",) * 3),
    RowSpec("mp-former", "MP-Former", PAPER, 3.1, ("done",) * 3),
)
COMPONENTS = (
    RowSpec("mask2former", "Mask2Former", MASK2FORMER, 0.0, ("done", "done", "done")),
    RowSpec(
        "mp-queries",
        "+ MP queries, first layer",
        {"mp_queries": True, "guided_layers": "first"},
        1.2,
        ("done", "done", "oom"),
    ),
    RowSpec(
        "guided",
        "+ every layer guided",
        {"mp_queries": True, "guided_layers": "every"},
        2.0,
        ("running", "queued", "planned"),
    ),
    RowSpec("point-noise", "+ point noise", {"mp_queries": True, "point_noise": 0.2}, 2.6, ("void", "stale", "lost")),
    RowSpec("mp-former", NASTY, PAPER, 3.1, ("done", "done", "done")),
)
NUCLEI = (
    RowSpec("mask2former", "Mask2Former", MASK2FORMER, 0.0, ("done",)),
    RowSpec("mp-former", "MP-Former", PAPER, 1.4, ("done",)),
)


def config(dataset: str, toggles: dict[str, Any], seed: int) -> Config:
    """A full mini configuration."""
    data: dict[str, Any] = {
        "name": dataset,
        "task": "panoptic" if dataset == "shapes" else "instance",
        "fingerprint": "0" * 64,
    }
    if dataset == "shapes":
        data["shapes"] = {}
    panoptic = dataset == "shapes"
    return Config.model_validate(
        {
            "dataset": data,
            "model": {
                "hidden_dim": 64,
                "conv_dim": 64,
                "mask_dim": 64,
                "decoder_layers": LAYERS,
                "queries": 20,
                "attention_strides": (16, 8, 4),
                "backbone": {"kind": "resnet", "depth": 18, "norm": "GN"},
            },
            "toggles": toggles,
            "schedule": {"max_iter": 1200, "batch_size": 8, "base_lr": 3e-4, "lr_schedule": "poly"},
            "evaluation": {"panoptic": panoptic, "semantic": panoptic},
            "seed": seed,
        }
    )


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


@dataclass(frozen=True)
class Run:
    spec: RowSpec
    dataset: str
    seed: int
    state: str

    @property
    def config(self) -> Config:
        return config(self.dataset, self.spec.toggles, self.seed)

    @property
    def run_id(self) -> str:
        return run_id(self.config)

    @property
    def eval_id(self) -> str:
        return eval_id(self.config)

    @property
    def noise(self) -> float:
        return float(np.random.default_rng([self.seed, len(self.spec.name)]).normal(0, 0.5)) + (self.seed - 1) * 0.8


def metrics(run: Run, share: float = 1.0) -> dict[str, float]:
    """Scores of a run; ``share`` of the schedule done."""
    grown = 1 - np.exp(-3.2 * share)
    ap = (13.5 + run.spec.gain + run.noise) * grown
    consistency = {
        "mIoU-L": 62 + 5.5 * run.spec.gain / 3.1 + run.noise,
        "mIoU-L-last": 55 + 6.5 * run.spec.gain / 3.1 + run.noise,
        "Util": 48 + 9 * run.spec.gain / 3.1 + run.noise,
        "Util-consecutive": 66 + 7 * run.spec.gain / 3.1 + run.noise,
    }
    scores = {"AP": ap, "AP50": ap * 1.9, "AP75": ap * 0.95, "APs": ap * 0.5, "APm": ap * 1.1, "APl": ap * 1.6}
    if run.dataset == "shapes":
        scores |= {
            "PQ": ap + 12,
            "SQ": 74 + run.noise,
            "RQ": (ap + 12) * 1.3,
            "PQ_th": ap + 8,
            "PQ_st": ap + 20,
            "mIoU": ap + 19,
        }
    return {key: round(float(value), 4) for key, value in (scores | consistency).items()}


def layer_numbers(run: Run) -> dict[str, list[float | None]]:
    """Per-layer numbers that rise towards the last layer."""
    final = metrics(run)
    rise = 1 - 0.75 * np.exp(-0.8 * np.arange(LAYERS + 1))
    rise = rise / rise[-1]
    layers: dict[str, list[float | None]] = {
        key: [round(float(final[key] * r), 4) for r in rise] for key in ("AP", "PQ", "mIoU") if key in final
    }
    layers["mIoU-L"] = [None, *[round(float(final["mIoU-L"] * (0.7 + 0.3 * r)), 4) for r in rise[1:]]]
    layers["mIoU-L-last"] = [round(float(100 - (100 - final["mIoU-L-last"]) * 1.6 * (1 - r)), 4) for r in rise]
    layers["Util"] = [round(float(100 - (100 - final["Util"]) * 1.6 * (1 - r)), 4) for r in rise]
    layers["Util-consecutive"] = [
        *[round(float(final["Util-consecutive"] * (0.6 + 0.4 * r)), 4) for r in rise[:-1]],
        None,
    ]
    layers["IoU-gt"] = [round(float((66 + run.spec.gain) * r), 4) for r in rise]
    layers["empty_pair_share"] = [None, *[round(float(4 * (1 - r)), 4) for r in rise[1:]]]
    layers["empty_attention_share"] = [round(float(20 * (1.05 - r)), 4) for r in rise[:-1]]
    return layers


def result(run: Run) -> dict[str, Any]:
    return {
        "schema": 1,
        "run_id": run.run_id,
        "eval_id": run.eval_id,
        "iteration": 1200,
        "complete": True,
        "images": 500,
        "metrics": metrics(run),
        "layers": layer_numbers(run),
        "used_query_share": 82.5,
        "effective_queries": 11.3,
        "scorers": {"pycocotools": "2.0.10", "panopticapi": "0.1"},
        "seconds": 31.2,
        "peak_memory_bytes": 1_650_000_000,
        "empty_ground_truth_share": {"16": 9.1, "8": 1.2, "4": 0.1},
    }


def metric_lines(run: Run, until: int) -> str:
    """metrics.jsonl up to an iteration: a line every 40 iterations, a probe every 400."""
    rng = np.random.default_rng([7, run.seed])
    lines = []
    for i in range(40, until + 1, 40):
        loss = 38 * np.exp(-i / 500) + 14 - run.spec.gain / 3 + rng.normal(0, 0.6)
        line = {
            "kind": "train",
            "iteration": i,
            "loss": loss,
            "loss_ce": loss * 0.2,
            "loss_mask": loss * 0.35,
            "loss_dice": loss * 0.45,
            "lr": 3e-4 * (1 - i / 1200) ** 0.9,
            "seconds": 0.19,
            "time": 1795338000 + i * 0.19,
        }
        lines.append({k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()})
        if i % 400 == 0:
            probe = {k: round(v, 3) for k, v in metrics(run, i / 1200).items() if k in ("AP", "PQ", "mIoU")}
            lines.append({"kind": "evaluation", "iteration": i, "metrics": probe, "time": 1795338000 + i * 0.19})
    return "".join(json.dumps(line) + "\n" for line in lines)


def provenance(run: Run) -> dict[str, Any]:
    mixed = run.spec.name == "mp-former" and run.seed == 2 and run.dataset == "shapes"
    diff = "--- a/mpformer/x.py\n+++ b/mpformer/x.py\n@@ -1 +1 @@\n-a = 1\n+a = 2  # </pre><script>alert(2)</script>\n"
    git = {
        "sha": ("b" if mixed else "a") * 40,
        "dirty": mixed,
        "untracked": [],
        "diff": diff if mixed else "",
        "diff_truncated": False,
    }
    return {
        "schema": 1,
        "time": 1795338000.0,
        "git": git,
        "command": ["mpformer", "launch", "headline", "--scale", "mini"],
        "host": "laptop-7",
        "platform": "Linux x86_64",
        "processor": "8-core laptop CPU",
        "cores": 8,
        "python": "3.11.2",
        "packages": {"torch": "2.4.1", "detectron2": "0.6"},
        "threads": 1,
        "world_size": 1,
        "job_id": "4711",
        "environment": {"OMP_NUM_THREADS": "1"},
    }


def attempt(runs: Path, run: Run, number: int, stage: str, outcome: str, events: list[tuple[str, str]]) -> None:
    folder = runs / run.run_id / "attempts" / str(number)
    ended = None if outcome == "" else CREATED + 250
    failed = {"failure_class": "oom", "detail": "out of memory at iteration 321"} if outcome == "failed" else {}
    write(
        folder / "stage.json", {"stage": stage, "started": CREATED, "ended": ended, "outcome": outcome or None} | failed
    )
    claim = {
        "host": "far-away",
        "machine": "another",
        "pid": 1,
        "born": "1",
        "token": "t",
        "job_id": "4711",
        "time": 1795338000,
    }
    write(runs / run.run_id / "claims" / str(number), claim)
    if outcome:
        write(runs / run.run_id / "claims" / f"{number}.released", "")
    write(folder / "provenance.json", provenance(run))
    write(folder / "log.txt", f"iteration 40 loss 49.1\n{NASTY}\n\x1b[1miteration 80\x1b[0m loss 44.0\n")
    lines = [{"time": 1795338000 + i, "state": state, "detail": detail} for i, (state, detail) in enumerate(events)]
    write(folder / "events.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def make_run(runs: Path, run: Run) -> None:
    """Write one run directory in its state; a planned one leaves nothing."""
    if run.state == "planned":
        return
    folder = runs / run.run_id
    write(
        folder / "run.json",
        {
            "schema": 1,
            "run_id": run.run_id,
            "scheme": 1,
            "seed": run.seed,
            "toggles": run.config.toggles.model_dump(mode="json"),
            "config": run.config.model_dump(mode="json"),
            "row": run.spec.name,
            "created": CREATED,
        },
    )
    if run.state == "queued":
        return
    until = {"running": 800, "oom": 320, "lost": 120}.get(run.state, 1200)
    write(folder / "metrics.jsonl", metric_lines(run, until))
    finish = {
        "running": ("", [("RUNNING", "")]),
        "oom": ("failed", [("RUNNING", ""), ("FAILED", "oom")]),
        "lost": ("", [("RUNNING", ""), ("LOST", "no heartbeat for 900 s")]),
    }.get(run.state, ("done", [("RUNNING", ""), ("TRAINED", ""), ("DONE", "")]))
    attempt(runs, run, 1, "all", *finish)
    if until < 1200:
        return
    write(
        folder / "trained.json",
        {
            "iterations": 1200,
            "seconds": 231.0 + run.seed,
            "peak_memory_bytes": 1_900_000_000,
            "weights": "checkpoints/final.pth",
            "weights_sha256": "c" * 64,
        },
    )
    eval_id = "instance-000000000000" if run.state == "stale" else run.eval_id
    write(folder / "evals" / eval_id / "result.json", result(run) | {"eval_id": eval_id})
    if run.state == "void":
        write(
            folder / "void.json", {"reason": "point noise was drawn once (bug 12)", "time": CREATED, "by": "a person"}
        )


def layers_parquet(folder: Path, run: Run, objects: int = 40) -> None:
    """Lines of ``layers.parquet`` for 10 images of 4 objects; mask piloting changes queries and masks less."""
    rng = np.random.default_rng([5, len(run.spec.name)])
    steady = 0.75 if run.spec.gain > 1 else 0.45
    names: dict[str, list[Any]] = {name: [] for name in layer_table.COLUMNS}
    for k in range(objects):
        final = int(rng.integers(0, 20) ** 2 // 20)
        for layer in range(LAYERS + 1):
            last = layer == LAYERS
            keeps = last or rng.random() < steady + 0.04 * layer
            near = 1.0 if last else float(np.clip(rng.beta(5 * steady * (layer + 1), 2), 0, 1))
            line = {
                "image_id": 1 + k // 4,
                "layer": layer,
                "object": k % 4,
                "class": k % 4,
                "thing": True,
                "area": 300,
                "query_final": final,
                "query_here": final if keeps else int(rng.integers(-1, 20)),
                "iou_previous": near if layer else np.nan,
                "iou_last": near,
                "iou_gt": near * 0.9,
                "score": min(1.0, 0.4 + 0.1 * layer),
                "predicted_class": k % 4,
                "both_empty_previous": False,
                "both_empty_last": False,
            }
            for name, value in line.items():
                names[name].append(value)
    columns: dict[str, np.ndarray] = {
        name: np.asarray(names[name], dtype=dtype) for name, dtype in layer_table.COLUMNS.items()
    }
    layer_table.write(layer_table.LayerTable(columns, LAYERS + 1, 20), folder / "layers.parquet")


def encode(mask: np.ndarray) -> str:
    """COCO's compressed string of a (h, w) mask."""
    flat = mask.T.reshape(-1).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - (flat[-1] if flat.size else 0)]])))
    runs = np.diff(np.concatenate([[0], edges])).tolist()
    out = []
    for i, count in enumerate(runs):
        x = count - (runs[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits, x = x & 0x1F, x >> 5
            more = x != (-1 if bits & 0x10 else 0)
            out.append(chr(48 + (bits | (0x20 if more else 0))))
    return "".join(out)


def disc(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    y, x = np.mgrid[0:GRID, 0:GRID]
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def picture(objects: list[tuple[float, float, float, float]], rng: np.random.Generator) -> Image.Image:
    base = np.clip(rng.normal(150, 14, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(base)
    draw = ImageDraw.Draw(image)
    for k, (cx, cy, rx, ry) in enumerate(objects):
        box = [(cx - rx) * 4, (cy - ry) * 4, (cx + rx) * 4, (cy + ry) * 4]
        draw.ellipse(box, fill=(90 + 25 * k, 120, 200 - 20 * k), outline=(30, 30, 30))
    return image.quantize(24)


def layer_masks(folder: Path, run: Run, images: int) -> None:
    """Masks of every layer: the baseline's jump to a neighbour in the middle layers, mask piloting's hardly do."""
    steady = run.spec.gain > 1
    (folder / "layer_masks").mkdir(parents=True, exist_ok=True)
    for image_id in range(1, images + 1):
        rng = np.random.default_rng([11, image_id])
        objects = [(8, 9, 5, 5), (20, 9, 5, 5), (11, 23, 6, 3), (25, 23, 4, 6)]
        objects = [tuple(float(v + rng.uniform(-1, 1)) for v in o) for o in objects]  # type: ignore[misc]
        name = f"{image_id}.png"
        picture(objects, rng).save(folder / "layer_masks" / name, optimize=True)  # type: ignore[arg-type]
        write(folder / "layer_masks" / f"{image_id}.json", json.dumps(one_image(image_id, name, objects, steady, run)))  # type: ignore[arg-type]
    shared = {"height": GRID, "width": GRID, "objects": 4}
    listed = [
        {"image_id": i, "file": f"val/{i}.png", "image": f"{i}.png", "record": f"{i}.json"} | shared
        for i in range(1, images + 1)
    ]
    write(folder / "layer_masks" / "index.json", {"schema": 1, "images": listed})


def one_image(image_id: int, name: str, objects: list[Any], steady: bool, run: Run) -> dict[str, Any]:
    truth = [disc(*o) for o in objects]
    layers = []
    previous: dict[int, np.ndarray] = {}
    for layer in range(LAYERS + 1):
        queries = []
        for k, mask in enumerate(truth):
            drift = 0.15 if steady else 0.35
            jump = not steady and layer == 2 + (k + image_id) % 3
            source = (
                truth[(k + 1) % len(truth)]
                if jump
                else np.roll(mask, round((LAYERS - layer) * drift * (1 + k % 2)), axis=k % 2)
            )
            if layer == 0:
                source = np.roll(mask, 4, axis=k % 2) if steady else np.zeros_like(mask)
            q = 3 * k + (1 if steady else 0)
            iou_previous = None if q not in previous else overlap(previous[q], source)
            previous[q] = source
            queries.append(
                {
                    "query": q,
                    "class": k,
                    "class_name": CLASSES[k],
                    "score": round(0.3 + 0.1 * layer + 0.01 * k, 3),
                    "object": k if not jump else -1,
                    "iou_previous": iou_previous,
                    "iou_gt": overlap(mask, source),
                    "rle": encode(source),
                }
            )
        layers.append({"layer": layer, "queries": queries})
    described = [
        {"object": k, "class": k, "class_name": CLASSES[k], "thing": True, "rle": encode(mask)}
        for k, mask in enumerate(truth)
    ]
    return {
        "image_id": image_id,
        "file": f"val/{image_id}.png",
        "image": name,
        "height": GRID,
        "width": GRID,
        "objects": described,
        "layers": layers,
    }


def overlap(a: np.ndarray, b: np.ndarray) -> float | None:
    union = np.logical_or(a, b).sum()
    return round(float(np.logical_and(a, b).sum() / union), 4) if union else None


def make_suite(
    root: Path, suite: str, dataset: str, title: str, paper_table: str, specs: tuple[RowSpec, ...]
) -> list[Run]:
    rows, runs = [], []
    for spec in specs:
        mine = [Run(spec, dataset, seed, state) for seed, state in enumerate(spec.states)]
        toggles = mine[0].config.toggles.model_dump(mode="json")
        listed = [{"seed": r.seed, "run_id": r.run_id, "eval_id": r.eval_id} for r in mine]
        changes = {f"toggles.{k}": v for k, v in spec.toggles.items()}
        rows.append({"name": spec.name, "label": spec.label, "toggles": toggles, "changes": changes, "runs": listed})
        runs += mine
    columns = ["AP", "PQ", "mIoU", "mIoU-L", "Util"]
    name = f"{suite}@mini" + ("" if dataset == "shapes" else f"+{dataset}")
    write(
        root / "suites" / f"{name}.json",
        {
            "schema": 1,
            "suite": suite,
            "scale": "mini",
            "dataset": dataset,
            "title": title,
            "paper_table": paper_table,
            "baseline": "mask2former",
            "columns": columns,
            "primary": "AP",
            "rows": rows,
            "created": CREATED,
            "ticks": suite == "components",
            "command": f"mpformer launch {suite} --scale mini",
            "not_applicable_columns": dict.fromkeys(("PQ", "mIoU"), "nuclei has one class and no stuff")
            if dataset == "nuclei"
            else {},
        },
    )
    return runs


def make_store(root: Path) -> Path:
    """Write the three suites and their runs below ``root``."""
    suites = (
        ("headline", "shapes", "Mask2Former against MP-Former", "unknown", HEADLINE),
        ("components", "shapes", "What each component adds", "unknown", COMPONENTS),
        ("headline", "nuclei", "Mask2Former against MP-Former", "unknown", NUCLEI),
    )
    for arguments in suites:
        for run in make_suite(root, *arguments):
            make_run(root / "runs", run)
    for spec, images in ((HEADLINE[0], 4), (HEADLINE[1], 4)):
        run = Run(spec, "shapes", 0, "done")
        layer_masks(root / "runs" / run.run_id / "evals" / run.eval_id, run, images)
        layers_parquet(root / "runs" / run.run_id / "evals" / run.eval_id, run)
    return root


if __name__ == "__main__":
    make_store(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "fixture_store")
