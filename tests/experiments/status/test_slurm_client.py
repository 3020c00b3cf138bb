"""One way to call Slurm's clients: what they print, or one line about why not."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.status import slurm_client
from experiments.status.slurm_client import SlurmError, call


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_times_come_as_seconds_and_words_in_english(client: Callable[..., None]) -> None:
    client("squeue", 'echo "$SLURM_TIME_FORMAT $LC_ALL $@"')
    assert call("squeue", "-h") == "%s C -h\n"


def test_a_job_inherits_the_environment_that_it_is_given_and_no_other(
    client: Callable[..., None], tmp_path: Path
) -> None:
    client("sbatch", '[ -z "$SLURM_TIME_FORMAT$LC_ALL" ] && [ "$1" = --parsable ] && echo "1234;lab"')
    assert slurm_client.submit(tmp_path / "script.sh", {"PATH": os.environ["PATH"]}) == "1234"


def test_a_refusal_is_one_line_in_the_clients_words(client: Callable[..., None]) -> None:
    client("sbatch", "printf 'sbatch: error: bad partition: x\\nsbatch: error: Invalid partition\\n' >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        call("sbatch")
    assert caught.value.said == "bad partition: x; Invalid partition"
    assert str(caught.value) == "sbatch does not answer: bad partition: x; Invalid partition"
    assert not caught.value.passing


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Slurm temporarily unable to accept job, sleeping and retrying",
    ],
)
def test_what_may_go_well_in_a_moment_is_marked(client: Callable[..., None], words: str) -> None:
    client("sbatch", f"echo '{words}' >&2; exit 1")
    with pytest.raises(SlurmError) as caught:
        call("sbatch")
    assert caught.value.passing


def test_a_client_that_hangs_or_is_not_there(client: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_client, "PATIENCE", 0.2)
    client("squeue", "exec sleep 60")
    with pytest.raises(SlurmError, match=r"^squeue did not answer within 0 s$") as caught:
        call("squeue")
    assert caught.value.passing
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match=r"^squeue is not installed here: Slurm cannot be asked$"):
        call("squeue")
