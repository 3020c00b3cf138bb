"""What a site says of a profile's job arrays before anything is submitted: ``sbatch --test-only``."""

import tempfile
from pathlib import Path

from experiments.launch.profiles import PARTS, SlurmProfile
from experiments.slurm import arrays
from experiments.slurm.arrays import Array
from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError
from mpformer.runtime.code import ROOT


def refusals(profile: SlurmProfile) -> dict[str, str]:
    """Return the site's words against each kind of array that the profile gives; empty where it would take it."""
    parts = {"runs": profile} | {name: profile.part(name) for name in PARTS if getattr(profile, name)}
    return {name: _refusal(name, part) for name, part in parts.items()}


def _refusal(name: str, profile: SlurmProfile) -> str:
    with tempfile.TemporaryDirectory() as folder:
        array = Array(profile, f"check.{name}", 1, Path(folder) / "jobs" / "0", ROOT)
        script = Path(folder) / "script.sh"
        script.write_text(arrays.script(array))
        try:
            environment = arrays.clean_environment()
            slurm_client.call("sbatch", "--test-only", str(script), clusters=profile.clusters, environment=environment)
        except SlurmError as error:
            return error.said
    return ""
