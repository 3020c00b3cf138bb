"""The study's runs, in the protocol's order, each suite's finished runs kept as archives as soon as it is through.

    python results/mini/run.py --root store --data-root datasets --keep results/mini/runs

Stop it whenever you like (Ctrl-C): the runs write checkpoints, and the same command goes on. On another machine it
first takes over what is kept, so that only what is missing is trained. A set that is not there is named with how to get
it, and left out. All runs have to be of one commit: this refuses to add runs of another one.
"""

import signal
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from experiments.execution import provenance
from experiments.store.run_dir import Store
from experiments.suites import catalogue, planning
from mpformer.runtime.errors import UserError

HERE = Path(__file__).resolve().parent
SUITES, FURTHER = HERE / "suites.py", HERE / "further.py"
SETS = ("shapes", "nuclei", "facades")
HEADLINE, BACKBONE = "study-headline", "study-backbone"
SEEDS, MORE_SEEDS = 8, "8-11"
REST = ("guided-layers", "point-noise", "flip-noise", "noise-type", "groups", "class-query", "query-position")
ORDER: tuple[tuple[str, str], ...] = (
    *((HEADLINE, name) for name in SETS),
    *(("study-convergence", name) for name in SETS),
    (BACKBONE, "shapes"),
    *(("study-components", name) for name in SETS),
    *((f"study-{suite}", name) for suite in REST for name in ("shapes", "facades")),
)
"""Suites and sets, those first that the verdicts of the page's table need most."""

HYPOTHESES = tuple((f"further-{name}", "shapes") for name in ("guidance", "length", "strides", "bare"))
"""Suites of further.py, after all that the protocol asks for: they share most runs with it."""

SET: dict[str, tuple[str, ...]] = {"nuclei": ("dataset.crop=96",)}
"""What suites.py says of a set in its rows and the code that the runs are of (c76743d) takes from ``--set`` alone."""

HOW_TO_GET = {
    "nuclei": "Of stage1_train of the 2018 Data Science Bowl (BBBC038, Broad Institute, CC0; with the community's mask "
    "corrections), the images that results/mini/nuclei.txt lists, then: mpformer data prepare nuclei FOLDER --crop 96",
    "facades": "From a checkout of a-hwang/building-facade-segmentation (GitHub, CC BY 4.0): python "
    "results/mini/facades.py CHECKOUT OUT; in OUT: mpformer data add facades --train "
    "facades/train/_annotations.coco.json --val facades/val/_annotations.coco.json --images facades/train "
    "--val-images facades/val --panoptic-from-instances largest-first "
    "--stuff facade,street,vegetation,fence,non-building-infrastructure --crop 96",
}


def missing_sets(data_root: Path) -> dict[str, str]:
    """How to get each set that is not there; the drawn one is prepared by a launch."""
    return {name: how for name, how in HOW_TO_GET.items() if not _there(name, data_root)}


def _there(dataset: str, data_root: Path) -> bool:
    overrides = tuple(planning.parse_override(text) for text in SET.get(dataset, ()))
    try:
        return not planning.make(planning.Request(HEADLINE, dataset=dataset, overrides=overrides), data_root).missing
    except UserError:  # a set of one's own that is not registered
        return False


def check_commit(keep: Store) -> None:
    """Raise UserError unless this checkout is committed and of the commit that the kept runs have."""
    found = provenance.git()
    here = found.sha
    if found.dirty:
        raise UserError("the code has changes: commit them, or take them back, before runs are made of it")
    for run in keep.runs():
        last = keep.reading(run.run_id).last_attempt()
        origin = last.provenance() if last is not None else None
        if origin is not None and origin.git.sha not in ("", here):
            raise UserError(
                f"the kept runs are of commit {origin.git.sha[:12]}, this is {here[:12]}: go on from a worktree of "
                f"that commit (git worktree add ../study {origin.git.sha[:12]}) with --keep {keep.root}"
            )
        if origin is not None:
            return


def mpformer(*words: str) -> int:
    """Run a command of this project's in a process of its own; ends this one too if it was asked to stop meanwhile."""
    print("mpformer", *words, flush=True)
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        if number == signal.SIGTERM:  # Ctrl-C has reached the command by itself
            command.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    command = subprocess.Popen([sys.executable, "-m", "experiments.cli.main", *words])
    code = command.wait()
    if asked:
        sys.exit("study: stopped; the same command goes on")
    return code


def main(options: Namespace) -> int:
    """Launch every suite and keep its runs; returns how many suites have runs that failed, or are not there."""
    catalogue.add_file(SUITES)
    keep, asked = Store(options.keep.resolve()), set(options.sets)
    lacking = {name: how for name, how in missing_sets(options.data_root).items() if name in asked}
    for name, how in lacking.items():
        print(f"{name} is not in {options.data_root}. {how}", file=sys.stderr)
    check_commit(keep)
    if (keep.root / "runs").is_dir():
        mpformer("import-runs", str(keep.root), "--root", str(options.root))
    there = asked - lacking.keys()
    steps = [(suite, name) for suite, name in ORDER if name in there and _applies(suite, name)]
    failed = sum(_suite(suite, name, options, keep) for suite, name in steps)
    failed += sum(_suite(*step, options, keep, MORE_SEEDS) for step in undecided(keep) if step[1] in there)
    failed += sum(_suite(suite, name, options, keep, suites=FURTHER) for suite, name in HYPOTHESES if name in there)
    return min(1, failed + len(lacking))


def undecided(keep: Store) -> list[tuple[str, str]]:
    """The headlines, suite and set, that get four more seeds: with eight, a cell of C1 to C3 is underpowered.

    One that has begun with them is named as well, whatever its verdicts are meanwhile: it is to end with all four.
    """
    from answers import NOT_RUN, Kept, answers

    cells = [one for one in answers(Kept(keep.root)) if one.claim in ("C1", "C2", "C3")]

    def gets_more(suite: str, name: str) -> bool:
        mine = [one for one in cells if (one.of.suite, one.set) == (suite, name)]
        whole = not any(one.verdict == NOT_RUN or 0 < one.n < SEEDS for one in mine)
        return whole and any(one.verdict == "underpowered" or one.n > SEEDS for one in mine)

    headlines = [*((HEADLINE, name) for name in SETS), (BACKBONE, "shapes")]
    return [step for step in headlines if gets_more(*step)]


def _applies(suite: str, dataset: str) -> bool:
    return not catalogue.find(suite).why_not(dataset)


def _suite(suite: str, dataset: str, options: Namespace, keep: Store, seeds: str = "", suites: Path = SUITES) -> bool:
    """Launch one suite, its own seeds or these, and keep its runs; whether some of them failed."""
    which = (suite, "--dataset", dataset, "--suites", str(suites), "--root", str(options.root))
    how = ("--data-root", str(options.data_root), "--no-report", "--no-mlflow", *(("--seeds", seeds) if seeds else ()))
    how += tuple(word for text in SET.get(dataset, ()) for word in ("--set", text))
    workers = ("--workers", str(options.workers)) if options.workers else ()
    try:
        return bool(mpformer("launch", *which, *how, *workers))
    finally:  # finished runs are kept, too, where the study is stopped
        _keep(suite, dataset, (*which, "--out", str(keep.root)))


def _keep(suite: str, dataset: str, which: Sequence[str]) -> None:
    if suite == HEADLINE:  # of one seed everything, but no pixel of a photograph
        mpformer("archive", *which, "--seeds", "0", *(() if dataset == "shapes" else ("--no-images",)))
    mpformer("archive", *which, "--light")


def parse(words: Sequence[str]) -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("store"), help="run store")
    parser.add_argument("--data-root", type=Path, default=Path("datasets"), help="where the sets are")
    parser.add_argument("--keep", type=Path, default=HERE / "runs", help="store of the kept archives")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="these sets alone; default: all")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; default: as a launch chooses")
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        sys.exit(main(parse(sys.argv[1:])))
    except UserError as error:
        sys.exit(f"study: {error}")
