"""Hypothesis 4 of hypotheses.md: what mask piloting costs with larger backbones, which it does not touch.

    python results/mini/cost_share.py --runs results/mini/runs --data-root datasets

The benchmark of C5 (costs.py) on facades, with the study's backbone, ResNet-18 of full width, and ResNet-50. Results go
into ``cost_share.json`` and, as a table with the outcome, into ``cost_share.md``. The machine should do nothing else.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from answers import BARELY, opened
from claims import BASELINE, PILOTED
from costs import configured, training

from experiments.execution import provenance
from mpformer.runtime.errors import UserError

HERE = Path(__file__).resolve().parent
SET = "facades"
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "R18, half width (the study's)": {},
    "R18": {"model.backbone.stem_channels": 64, "model.backbone.res2_channels": 64},
    "R50": {
        "model.backbone.depth": 50,
        "model.backbone.stem_channels": 64,
        "model.backbone.res2_channels": 256,
        "model.backbone.width_per_group": 64,
    },
}


def outcome(narrow: Mapping[str, Any], large: Mapping[str, Any]) -> str:
    """*supported*, *refuted* or *undecided*, from the ratios of seconds with the smallest and the largest backbone."""
    if large["median"] >= narrow["median"]:
        return "refuted"
    below = large["middle_half"][1] < min(BARELY, narrow["middle_half"][0])
    return "supported" if below else "undecided"


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The backbones with their ratios, and the outcome, as Markdown."""
    lines = [
        "| backbone | Mask2Former's step (s) | seconds × | middle half | memory × | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in found.items():
        low, high = of["seconds"]["middle_half"]
        step, times = of["median_seconds"][BASELINE], of["seconds"]["median"]
        lines.append(
            f"| {name} | {step:.2f} | {times:.2f} | {low:.2f} … {high:.2f} | {of['memory_ratio']:.2f} | {of['pairs']} |"
        )
    first, *_, last = found.values()
    return "\n".join([*lines, "", f"By the rule: **{outcome(first['seconds'], last['seconds'])}**.", ""])


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="store with the headline's runs")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the sets are")
    parser.add_argument("--pairs", type=int, default=60, help="pairs of steps")
    parser.add_argument("--out", type=Path, default=HERE / "cost_share.json")
    options = parser.parse_args(words)
    store = opened(options.runs, options.data_root)
    (_, plain), (_, piloted) = (configured(store, SET, row) for row in (BASELINE, PILOTED))
    found = {
        name: training(plain.replace(dict(changes)), piloted.replace(dict(changes)), options.data_root, options.pairs)
        for name, changes in BACKBONES.items()
    }
    options.out.write_text(json.dumps({"commit": provenance.git().sha, "backbones": found}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"study: {error}")
