"""Hypothesis 1 of hypotheses.md: what the attention masks are worth to each model, by three decoder passes.

    python results/mini/attention_masks.py --root store --data-root datasets [--dataset shapes …]

C8's cosine compares the gradients under predicted and under true attention masks. It falls where predicted masks are
bad, and also where a model makes more of its masks. A third pass, in which the same queries attend everywhere, tells
the two apart. Read are the weights of the headline's runs, so this runs where they were trained: light archives have
none. Results go into ``attention_masks.json`` and, as a table, into ``attention_masks.md``; pairs of seeds that were
measured where they were trained, on another machine, stay.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from answers import effect, opened, p_text, signed
from claims import BASELINE, PILOTED, SETS

from analysis.gradients import compare_gradients
from analysis.statistics import paired_t, summarise
from experiments.execution import provenance
from experiments.store.run_dir import RunDir, Store
from experiments.store.suite_record import SuiteRecord
from mpformer.data.validation import validation_items
from mpformer.evaluation.gradient_accuracy import Under, under_masks
from mpformer.modeling.meta_arch import build_model
from mpformer.modeling.weights import load_weights
from mpformer.runtime.errors import UserError
from mpformer.runtime.process import prepare_process

HERE = Path(__file__).resolve().parent
SUITE, IMAGES = "study-headline", 64
"""So many images, the first ones, as for C8."""
COSINES = (("predicted masks", "true masks"), ("predicted masks", "no masks"), ("true masks", "no masks"))
LOSSES = ("predicted masks", "true masks", "no masks")

Numbers = dict[str, float]
Measured = Mapping[str, Mapping[str, Numbers]]
"""By row, then seed."""


def measure(run: RunDir, data_root: Path) -> Numbers:
    """Means over layers 1 to L and all (image, query) pairs; cosines in hundredths. The run has its weights."""
    config = run.config().replace({"runtime.threads": 1})
    model = build_model(config).eval()
    with run.whole() as here:
        weights = here.weights()
        assert weights is not None
        load_weights(model, weights)
    return numbers(under_masks(model, config, validation_items(config, data_root, IMAGES)))


def has_weights(run: RunDir) -> bool:
    """Whether the run is trained and its weights are here, in its directory or in its archive."""
    with run.whole() as here:
        return here.weights() is not None


def pairs(record: SuiteRecord, store: Store) -> dict[int, dict[str, RunDir]]:
    """By seed the runs of both rows, where both have weights here."""
    found: dict[int, dict[str, RunDir]] = {}
    for row, planned in record.runs():
        run = store.run(planned.run_id)
        if has_weights(run):
            found.setdefault(planned.seed, {})[row.name] = run
    return {seed: rows for seed, rows in sorted(found.items()) if rows.keys() == {BASELINE, PILOTED}}


def numbers(under: Mapping[str, Under]) -> Numbers:
    """The cosine of each pair of kinds, and the mask loss under each kind."""
    found = {}
    for first, second in COSINES:
        cosine = compare_gradients(under[first].gradients, under[second].gradients).cosine
        found[f"cosine, {first} and {second}"] = 100 * float(cosine[1:].mean())
    loss = {kind: float(under[kind].losses[1:].mean()) for kind in LOSSES}
    found |= {f"loss, {kind}": value for kind, value in loss.items()}
    return found | {f"loss, {kind} less true masks": loss[kind] - loss["true masks"] for kind in (LOSSES[0], LOSSES[2])}


def table(found: Mapping[str, Measured]) -> str:
    """Every number of each set with its paired difference, as Markdown."""
    lines = ["| set | number | Mask2Former | MP-Former | difference (95 %) | p | n |", "|---|---|---|---|---|---|---|"]
    for name, rows in found.items():
        for key in next(iter(rows[BASELINE].values())):
            theirs, mine = ({int(s): each[key] for s, each in rows[row].items()} for row in (BASELINE, PILOTED))
            test = paired_t(theirs, mine)
            means = [summarise(list(each.values())).text(2) for each in (theirs, mine)]
            difference = effect(test) if "cosine" in key else _fine(test.effect, test.low, test.high)
            lines.append(f"| {name} | {key} | {means[0]} | {means[1]} | {difference} | {p_text(test.p)} | {test.n} |")
    return "\n".join(lines) + "\n"


def _fine(middle: float, low: float | None, high: float | None) -> str:
    return f"{signed(middle, 2)} ({signed(low, 2)} … {signed(high, 2)})"


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("store"), help="store that the headline was trained in")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the sets are")
    parser.add_argument("--dataset", action="append", choices=SETS, help="only this set; repeatable")
    parser.add_argument("--out", type=Path, default=HERE / "attention_masks.json")
    options = parser.parse_args(words)
    store = opened(options.root, options.data_root)
    prepare_process("cpu", 1)
    known: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    asked = options.dataset or SETS
    records = [one for one in store.suite_records() if one.suite == SUITE and one.dataset in asked]
    if not records:
        raise UserError(f"no run of {SUITE} on {' or '.join(asked)} is in {options.root}; make study trains them")
    for record in records:
        empty = {"images": IMAGES, "commits": {}, "rows": {BASELINE: {}, PILOTED: {}}}
        of_set = known.setdefault(record.dataset, empty)
        for seed, runs in pairs(record, store).items():
            for name, run in runs.items():
                of_set["rows"][name][str(seed)] = measure(run, options.data_root)
            of_set["commits"][str(seed)] = provenance.git().sha
            options.out.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{record.dataset}: seeds {', '.join(sorted(of_set['commits'], key=int)) or 'none'}", flush=True)
    options.out.with_suffix(".md").write_text(table({name: of["rows"] for name, of in known.items() if of["commits"]}))
    print(options.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"study: {error}")
