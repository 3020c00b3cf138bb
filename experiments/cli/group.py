"""The group that every command joins."""

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="mpformer")
def cli() -> None:
    """Reproduce, ablate and explain MP-Former: launch a named suite, read its tables.

    \b
    mpformer suites                  what there is
    mpformer launch headline         train, evaluate, analyse what is missing
    mpformer report headline         tables and figures beside the paper's numbers
    """
