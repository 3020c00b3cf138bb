"""``mpformer profile``: what a site says of a profile."""

import click

from experiments.cli.group import cli
from mpformer.runtime.errors import UserError


@cli.group()
def profile() -> None:
    """Profiles: where runs are executed, and how."""


@profile.command()
@click.argument("name", metavar="PROFILE")
def check(name: str) -> int:
    """Ask the site whether it would take each kind of job array of PROFILE; nothing is submitted."""
    from experiments.launch import profiles
    from experiments.slurm import arrays, limits

    found = profiles.load(name)
    if not isinstance(found, profiles.SlurmProfile):
        raise UserError(f"profile {name!r} is of this machine, where nobody is asked; give a Slurm profile")
    limits.require()
    refused = arrays.refusals(found)
    for kind, said in refused.items():
        click.echo(f"{kind:<9} {f'refused: {said}' if said else 'the site would take it'}")
    return 1 if any(refused.values()) else 0
