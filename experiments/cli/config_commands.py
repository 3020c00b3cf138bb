"""``mpformer config``: every key of the configuration, and what presets and settings differ in."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from experiments.cli.console import print_json
from experiments.cli.group import cli
from experiments.cli.options import json_option
from mpformer.config.dotted import MISSING
from mpformer.runtime.errors import UserError, choices

if TYPE_CHECKING:
    from mpformer.config.listing import Key
    from mpformer.config.schema import Config

_IDS = {
    "run": "changes the run id",
    "piloted run": "changes the run id where mp_queries is on",
    "evaluation": "changes the evaluation id",
    "": "outside the ids",
}


@cli.command()
@click.argument("sections", nargs=-1)
@click.option(
    "--base",
    default=None,
    help="Values of this instead of defaults: a setting such as coco/instance/r50-12ep, a preset, a dataset of scale "
    "mini, or a Mask2Former-style YAML file.",
)
@click.option("--diff", "pair", nargs=2, default=None, metavar="A B", help="What two presets, or settings, differ in.")
@json_option
def config(sections: Sequence[str], base: str | None, pair: tuple[str, str] | None, as_json: bool) -> None:
    """List the keys of the configuration, or those of SECTIONS such as toggles: type, default, meaning, and which id
    each changes."""
    if pair is not None:
        return _print_difference(pair, base, as_json)
    from experiments.store.identity import part_of
    from mpformer.config.listing import keys

    found = [key for key in keys(_named(base, None) if base else None) if _asked_for(key.name, sections)]
    if not found:
        raise choices("section", " ".join(sections), dict.fromkeys(key.name.split(".")[0] for key in keys()))
    if as_json:
        return print_json([_plain(key, part_of(key.name)) for key in found])
    for key in found:
        shown = "(has to be set)" if key.default is MISSING else json.dumps(key.default)
        click.echo(f"{key.name} = {shown}   ({key.type}; {_IDS[part_of(key.name)]})")
        click.echo(f"    {key.meaning}")
    return None


def _asked_for(name: str, sections: Sequence[str]) -> bool:
    return not sections or any(name == section or name.startswith(f"{section}.") for section in sections)


def _plain(key: "Key", id_: str) -> dict[str, Any]:
    return {**asdict(key), "default": None if key.default is MISSING else key.default, "id": id_}


def _print_difference(pair: tuple[str, str], base: str | None, as_json: bool) -> None:
    from mpformer.config.listing import difference

    one, other = (_named(name, base) for name in pair)
    found = difference(one, other)
    if as_json:
        return print_json(found)
    for key, (first, second) in found.items():
        click.echo(f"{key}: {json.dumps(first)} -> {json.dumps(second)}")
    if not found:
        click.echo("no difference")
    return None


def _named(name: str, base: str | None) -> "Config":
    """The configuration that a name stands for; a preset changes the base."""
    from experiments.suites import scales
    from mpformer.config import paper_settings, presets

    minis = scales.datasets("mini")
    if name.endswith((".yaml", ".yml")):
        from experiments.runs import single

        return single.read_config(name, ())
    if name in presets.PRESETS:
        return _named(base or minis[0], None).replace(presets.changes(name))
    if name in minis:
        return scales.base("mini", name)
    try:
        return paper_settings.setting(name)
    except UserError:
        if "/" in name and not name.startswith(("mp-former/", "mask2former")):
            raise
        raise choices("preset or setting", name, (*presets.PRESETS, *minis, "coco/instance/r50-12ep ...")) from None
