"""Cases of golden values and the rules by which they are compared.

The tolerances are those that came with the golden files: tests/golden/README.md says what each key is and
how large the reference's own rounding noise is (2.3e-5 on mask logits, 2.4e-6 on class logits, 2.4e-7 on losses).
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.golden_io import Case

FOLDER = Path(__file__).parents[1] / "golden"
Arrays = dict[str, np.ndarray]

# First matching pattern wins: (key pattern, kind of comparison, options).
RULES: list[tuple[str, str, dict[str, float]]] = [
    (r"^out/match/", "pairs", {}),
    (r"/inst_(scores|classes|masks)/", "skip", {}),  # compared together by compare_instances
    (r"^out/\w+/panoptic_info/", "mismatch", {"most": 0.0}),
    (r"^out/\w+/panoptic_seg/", "mismatch", {"most": 1e-3}),
    (r"^out/(xattn_mask|self_attn_mask|mp/slot_is_gt|mp/labels_used)", "mismatch", {"most": 0.0}),
    (r"^out/grad_names$", "skip", {}),
    (r"^out/grad_norms$", "norms", {"rtol": 2e-3}),
    (r"^out/grad/", "relative", {"tol": 2e-3}),
    (r"^out/(loss|seeded_loss)/|^out/total_weighted", "close", {"atol": 2e-5, "rtol": 1e-4}),
    (r"^mid/backbone/", "close", {"atol": 1e-4, "rtol": 1e-3}),
    (r".*", "close", {"atol": 5e-4, "rtol": 2e-4}),
]


@dataclass(frozen=True)
class GoldenCase:
    """One golden file; attributes as the comparison script gives them to an adapter."""

    path: Path

    @classmethod
    def named(cls, name: str) -> "GoldenCase":
        return cls(FOLDER / f"{name}.npz")

    @cached_property
    def _file(self) -> Arrays:
        with np.load(self.path, allow_pickle=False) as archive:
            return {k: archive[k] for k in archive.files}

    @cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads(str(self._file["meta_json"]))

    @cached_property
    def inputs(self) -> Arrays:
        return {k[3:]: v for k, v in self._file.items() if k.startswith("in/")}

    @cached_property
    def golden(self) -> Arrays:
        return {k: v for k, v in self._file.items() if k.startswith(("out/", "mid/"))}

    @cached_property
    def state(self) -> Arrays:
        with np.load(FOLDER / "weights_tiny.npz", allow_pickle=False) as archive:
            return {k: archive[k] for k in archive.files}


def problems(got: Arrays, case: Case, only: str = "") -> tuple[list[str], list[str]]:
    """What differs, one line a key, and the golden keys that ``got`` lacks."""
    wrong, missing = [], []
    for key, want in case.golden.items():
        if only and not re.search(only, key):
            continue
        if key not in got:
            missing.append(key)
            continue
        why = difference(key, got[key], want)
        wrong += [f"{key}: {why}"] if why else []
        if match := re.fullmatch(r"(out/\w+)/inst_scores/(\d+)", key):
            why = instances_differ(match[1], match[2], got, case.golden)
            wrong += [f"{match[1]} instances of image {match[2]}: {why}"] if why else []
    return wrong, missing


def difference(key: str, got: np.ndarray, want: np.ndarray) -> str | None:
    """Why ``got`` is not ``want`` by the rule of ``key``; None if it is."""
    kind, options = next((kind, options) for pattern, kind, options in RULES if re.search(pattern, key))
    if kind == "skip":
        return None
    if kind == "pairs":
        extra = set(zip(*got.tolist(), strict=True)) ^ set(zip(*want.tolist(), strict=True))
        return f"{len(extra)} pairs differ" if extra else None
    if got.shape != want.shape:
        return f"shape {got.shape}, not {want.shape}"
    if want.size == 0:
        return None
    return _numbers_differ(kind, options, got, want)


def _numbers_differ(kind: str, options: dict[str, float], got: np.ndarray, want: np.ndarray) -> str | None:
    if kind == "mismatch":
        share = float((got != want).mean())
        return f"{share:.3%} of the values differ" if share > options["most"] else None
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not np.isfinite(got).all():
        return "not finite"
    error = np.abs(got - want)
    if kind == "relative":
        relative = float(np.linalg.norm(got - want)) / max(float(np.linalg.norm(want)), 1e-12)
        return f"relative error {relative:.2e}" if relative > options["tol"] else None
    atol = options["atol"] if kind == "close" else 1e-4 * max(1e-12, float(np.abs(want).max()))
    over = error > atol + options["rtol"] * np.abs(want)
    return f"{over.mean():.2%} too far off, worst {error.max():.2e}" if over.any() else None


def instances_differ(prefix: str, image: str, got: Arrays, want: Arrays) -> str | None:
    """Greedy one-to-one partners inside each class (the order of rows is free)."""

    def rows(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores, classes, masks = (arrays[f"{prefix}/inst_{n}/{image}"] for n in ("scores", "classes", "masks"))
        return scores, classes, masks.reshape(len(scores), -1) > 0

    (scores, classes, masks), (want_scores, want_classes, want_masks) = rows(got), rows(want)
    if len(scores) != len(want_scores):
        return f"{len(scores)} rows, not {len(want_scores)}"
    free = set(range(len(scores)))
    for j in range(len(want_scores)):
        near = [
            (abs(float(scores[k] - want_scores[j])), float((masks[k] != want_masks[j]).mean()), k)
            for k in free
            if classes[k] == want_classes[j]
        ]
        if not near:
            return f"no partner of class {int(want_classes[j])}"
        score_error, pixel_error, k = min(near, key=lambda n: n[0] + n[1])
        if score_error > 1e-3 or pixel_error > 2e-3:
            return f"nearest row is off by {score_error:.1e} in score, {pixel_error:.2%} of its pixels"
        free.remove(k)
    return None
