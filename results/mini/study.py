"""The study's page and figures from the runs that are kept: ``make study-report``.

    python results/mini/study.py [--runs results/mini/runs] [--out results/mini] [--lead README.md]

Writes ``README.md`` and ``figures/``, and the claims' table between the marks of the README that ``--lead`` names. A
study that is under way gives a page that says so.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from answers import Kept, answers
from page import lead, page
from pictures import draw

from experiments.suites import catalogue
from mpformer.runtime.errors import UserError

HERE = Path(__file__).resolve().parent


def write(kept: Kept, out: Path) -> None:
    """Write the figures, then the page that shows them.

    Raises UserError if the runs are of several states of the code, or if a photograph is kept.
    """
    kept.commit()
    kept.check_no_photographs()
    draw(kept, answers(kept), out / "figures")
    (out / "README.md").write_text(page(kept, out))


def main(words: Sequence[str]) -> None:
    """The command line."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="store of the kept runs")
    parser.add_argument("--out", type=Path, default=HERE, help="where README.md and figures/ go")
    parser.add_argument("--lead", type=Path, help="a README that gets the claims' table between its marks")
    options = parser.parse_args(words)
    catalogue.add_file(HERE / "suites.py")
    kept = Kept(options.runs)
    write(kept, options.out)
    if options.lead:
        options.lead.write_text(lead(kept, options.out, options.lead.read_text()))
    print(options.out / "README.md")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"study: {error}")
