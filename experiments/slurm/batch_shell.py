"""What the batch shell does around a job: whatever ends it that is not the run's own doing, the job is queued again.

The job's exit code says by whose doing it ended. The run's own codes are few; with any other (``srun`` could not start
its task, a credential had expired, the watching process was killed) the infrastructure ended it. The shell asks for the
requeue itself, so that jobs in containers without Slurm's clients come back too, and asks for half an hour if the
controller is away.

Each start that the infrastructure ended is a line of the launch's file of deaths (:mod:`experiments.store.launches`).
The next start comes after a pause, which grows from one such start of a job to the next and is Slurm's to keep, so that
no node waits; after half an hour of pauses in a row the job fails. A node on which two starts of the launch died is
left out for what is queued again, unless that would be half of the partition.
"""

import shlex
from pathlib import Path

from experiments.status.failures import START, WORD

FAILED = 81
"""Exit code of a job whose run has failed, or is not to be tried: it would only do so again."""

AGAIN = 82
"""Exit code of a job that is to be queued again: its run is checkpointed, or its attempt was killed."""

BROKEN = 83
"""Exit code of a job whose GPU failed: not the run's doing, as any code that is not named here."""

DEATHS = "MPFORMER_DEATHS"
"""Variable that names the file of deaths."""


def before(deaths: Path, exclude: str | None = None) -> list[str]:
    """Return the shell lines before ``srun``; ``deaths`` is the launch's file, ``exclude`` the profile's nodes."""
    return [
        f"mpformer_exclude={shlex.quote(exclude or '')}",
        f"export {DEATHS}={shlex.quote(str(deaths))}",
        f'echo "{START}${{SLURM_RESTART_COUNT:-0}} of job $SLURM_JOB_ID on ${{SLURMD_NODENAME:-?}}"',
        "trap 'mpformer_ended=1' TERM",
    ]


AFTER = rf"""
mpformer_status=$?
# of an array's elements the last to begin has the array's own number, by which Slurm would queue all of them again
mpformer_job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
mpformer_job=${{mpformer_job:-$SLURM_JOB_ID}}
case $mpformer_status in 0|{FAILED}) exit "$mpformer_status";; esac
mpformer_changes=
if [ "$mpformer_status" != {AGAIN} ]; then
  sleep 5  # what ended the step may be about to end the job
  [ -z "${{mpformer_ended:-}}" ] || exit "$mpformer_status"
  mpformer_start=${{SLURM_RESTART_COUNT:-0}} mpformer_node=${{SLURMD_NODENAME:-?}}
  [ "${{SLURM_JOB_NUM_NODES:-1}}" = 1 ] || mpformer_node='?'  # nobody knows which of them it was
  echo "$(date +%s) $SLURM_JOB_ID $mpformer_start $mpformer_node $mpformer_status $SECONDS" >> "${DEATHS}"
  mpformer_row=$(awk -v job="$SLURM_JOB_ID" -v start="$mpformer_start" \
    '$2 == job && $6 < 600 {{died[$3]}} END {{while (start in died) {{row++; start--}} print row + 0}}' "${DEATHS}")
  if [ "$mpformer_row" -gt 9 ]; then
    echo "{WORD}the infrastructure ended $mpformer_row starts in a row, the last on $mpformer_node with exit code" \
      "$mpformer_status; launch again when the site is well"
    exit "$mpformer_status"
  fi
  mpformer_pause=$((mpformer_row > 5 ? 300 : 10 << mpformer_row))
  mpformer_pause=$((mpformer_pause * 3 / 4 + RANDOM % (1 + mpformer_pause / 2)))
  mpformer_nodes=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o %N | sort -u | wc -l)
  mpformer_bad=$(awk -v nodes="$mpformer_nodes" '$1 == "forget" {{split("", died)}} NF == 6 && $4 != "?" {{died[$4]++}}
    END {{for (node in died) if (died[node] > 1 && 2 * ++bad < nodes) print node}}' "${DEATHS}" | paste -sd,)
  mpformer_changes="StartTime=now+$mpformer_pause"
  [ -z "$mpformer_bad" ] || mpformer_changes+=" ExcNodeList=${{mpformer_exclude:+$mpformer_exclude,}}$mpformer_bad"
fi
mpformer_end=$((SECONDS + 1800))
until mpformer_said=$(scontrol requeue "$mpformer_job" 2>&1); do
  case $mpformer_said in *"pending execution"*) exit "$mpformer_status";; esac
  if [[ $mpformer_said == *disabled* || -n ${{mpformer_ended:-}} || $SECONDS -gt $mpformer_end ]]; then
    echo "{WORD}the job could not be requeued: ${{mpformer_said//$'\n'/ }}; launch again to continue"
    exit "$mpformer_status"
  fi
  sleep $((5 + RANDOM % 10))
done
trap '' TERM  # Slurm is about to end this shell
[ -z "$mpformer_changes" ] || scontrol update JobId="$mpformer_job" $mpformer_changes
exit "$mpformer_status"
""".strip().splitlines()
"""The shell lines after ``srun``."""
