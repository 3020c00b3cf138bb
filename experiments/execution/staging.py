"""A run's dataset on its node's own disk: copied once a node, by whichever process comes first, and used in base."""

import fcntl
import os
import shutil
from pathlib import Path

from experiments.store.files import replacing
from experiments.suites import datasets
from mpformer.config.schema import Config
from mpformer.runtime.errors import RunFailure


def staged(config: Config, data_root: Path, target: str) -> Path:
    """Return a data root on the node that holds the run's dataset, copied if it is not there yet.

    Processes of one node wait for each other; a copy that was cut short is made again. Raises RunFailure("disk") if it
    does not fit, and RunFailure("data") if the target names a variable that the node does not have.
    """
    base = Path(os.path.expandvars(target))
    if "$" in str(base):
        raise RunFailure("data", f"the profile's stage_to, {target}, names a variable that this node does not have")
    root = base / f"mpformer-{config.dataset.fingerprint[:12] or config.dataset.name}"
    folder = datasets.folder(config, data_root).relative_to(data_root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:  # a node's own disk: locks work there
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / folder).is_dir():
                with replacing(root / folder) as temporary:
                    shutil.copytree(data_root / folder, temporary)
    except OSError as error:
        why = error.strerror or error
        raise RunFailure("disk", f"cannot stage the dataset to {root}: {why}; see stage_to in the profile") from None
    return root
