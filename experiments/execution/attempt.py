"""One execution of a run's stages: claim, train, evaluate, and leave files that say how it ended.

:func:`run_attempt` is the one entry point of every executor. What it writes last is what counts: ``trained.json`` after
the final weights, ``result.json`` after everything else of an evaluation.
"""

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.execution import provenance
from experiments.execution.capture import captured
from experiments.execution.signals import Noted
from experiments.execution.staging import staged
from experiments.execution.training_log import line_of
from experiments.status import failures
from experiments.store import claims
from experiments.store.attempt_dir import AttemptRecord, Ending, FailureClass, Outcome, Stop, StopReason
from experiments.store.files import append_json, sync
from experiments.store.identity import eval_id as evaluation_id
from experiments.store.identity import run_id as _run_id
from experiments.store.launches import stop_reason
from experiments.store.records import decode
from experiments.store.run_dir import Result, RunDir, Store
from mpformer.config.schema import Config
from mpformer.runtime import code
from mpformer.runtime.callbacks import Interrupted, TrainCallbacks
from mpformer.runtime.errors import RunFailure, UserError
from mpformer.runtime.rank import RENDEZVOUS, current_rank

Stage = Literal["all", "train", "evaluate"]

_log = logging.getLogger(__name__)

RESERVE_BYTES = 65536
"""Kept aside in an attempt so that a full disk still lets it say so."""


class Runner(Protocol):
    """What trains and scores a model; torch is imported here and nowhere else in this package."""

    def train(self, config: Config, directory: Path, data_root: Path, callbacks: TrainCallbacks) -> dict[str, Any]:
        """See :func:`mpformer.training.trainer.train`."""
        from mpformer.training.trainer import train

        return train(config, directory, data_root, callbacks)

    def evaluate(
        self, config: Config, weights: Path, out: Path, data_root: Path, progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Write everything but ``result.json`` into ``out``; see :func:`mpformer.evaluation.evaluate.evaluate`."""
        from mpformer.evaluation.evaluate import evaluate

        return evaluate(config, weights, out, data_root, progress=progress)


class Model(Runner):
    """The real thing; tests put something small in its place."""


@dataclass(frozen=True)
class Options:
    """How an attempt is executed; nothing here can change a result but for threads, which are recorded."""

    data_root: Path
    launch: str = ""
    threads: int | None = None
    stop_file: Path | None = None
    """A file whose appearance asks the attempt to checkpoint and stop; its content is the reason."""
    capture: bool = True
    """Send stdout and stderr to the attempt's log; off for a debugger."""
    anew: bool = False
    """Score a run again that has a result of this setting, which is replaced once the new one is complete."""
    stage_to: str | None = None
    """Directory of the node's own disk to copy the dataset to; ``$VARIABLES`` are those of the node."""

    def data(self, config: Config) -> Path:
        """Return the data root to read from; raises RunFailure if the dataset cannot be copied to the node."""
        return self.data_root if self.stage_to is None else staged(config, self.data_root, self.stage_to)


def run_attempt(
    root: Path,
    run_id: str,
    stage: Stage,
    options: Options,
    runner: Runner | None = None,
    config: Config | None = None,
) -> Ending:
    """Execute what is missing of a run's ``stage``; returns how it ended and never raises for a run's failure.

    ``config`` is the run's, with other runtime or evaluation settings than ``run.json`` has; None: those of
    ``run.json``. Returns ``skipped`` if another process holds the run or nothing is left to do. Of several processes
    of one run, the main one does all this; the others help it to train and to evaluate. Raises
    UserError if the run's record is damaged, or ``config`` is another run's.
    """
    run = Store(root).run(run_id)
    config = _checked(run, config, options)
    if run.packed:
        if not options.anew and complete(run, stage, config):
            return Ending(Outcome.SKIPPED, detail="nothing is left to do")
        run.unpack()
    if not current_rank().main:
        return follow(run, config, stage, options, runner or Model())
    try:
        claim = claims.acquire(run.claims, job=provenance.execution())
    except OSError as error:
        return Ending(Outcome.FAILED, FailureClass.DISK, f"cannot claim the run: {error}")
    if claim is None:
        return Ending(Outcome.SKIPPED, detail="another process holds the run")
    try:
        _note_lost_predecessors(run, claim.number)
        if not options.anew and complete(run, stage, config):
            return Ending(Outcome.SKIPPED, detail="nothing is left to do")
        return _Attempt(run, config, claim, stage, options, runner or Model()).execute()
    finally:
        claim.release()


def follow(run: RunDir, config: Config, stage: Stage, options: Options, runner: Runner) -> Ending:
    """Help the main process to train and evaluate the run: in its attempt, without a claim, writing a log and parts."""
    stop = Noted()
    with stop.signals():
        number = _main_attempt(run, stage, config, stop)
        if number is None:
            return Ending(Outcome.SKIPPED, detail="nothing is left to do")
        directory = run.attempt(number).path
        with captured(directory / f"log.{current_rank().number}.txt", options.capture), _rendezvous(directory):
            try:
                if stage != "evaluate" and run.trained() is None:
                    callbacks = TrainCallbacks(stop=stop.text)
                    runner.train(config, run.path, options.data(config), callbacks)
                if stage != "train":
                    _help_to_evaluate(run, config, options, runner, stop)
            except Interrupted as stopped:
                return Ending(Outcome.INTERRUPTED, detail=str(stopped), attempt=number)
            except BaseException as error:
                traceback.print_exc()
                return failure(error, number)
    return Ending(Outcome.TRAINED if stage == "train" else Outcome.DONE, attempt=number)


def _help_to_evaluate(run: RunDir, config: Config, options: Options, runner: Runner, stop: "Noted") -> None:
    """Score a share of the images once the main process has recorded the training, unless it has ended."""

    def may_go_on(_: Mapping[str, Any]) -> None:
        reason = stop.text()
        if reason is not None:
            raise Interrupted(reason, config.schedule.max_iter)

    while (trained := run.trained()) is None and own_attempt(run) is not None:
        may_go_on({})
        time.sleep(0.5)
    if trained is None or complete(run, "evaluate", config):
        return
    out = run.evaluation(evaluation_id(config))
    runner.evaluate(config, run.path / trained.weights, out, options.data(config), may_go_on)


def _main_attempt(run: RunDir, stage: Stage, config: Config, stop: "Noted") -> int | None:
    """Wait for the main process to begin; None if nothing is left to do, or one is to stop."""
    while not complete(run, stage, config) and stop.reason() is None:
        number = own_attempt(run)
        if number is not None:
            return number
        time.sleep(0.5)
    return None


def own_attempt(run: RunDir) -> int | None:
    """Return the attempt that this start of this job's step has under way, None if there is none (yet)."""
    last = run.last_attempt()
    record = last.sound_record() if last is not None else None
    if last is None or record is None or record.outcome is not None:
        return None
    return last.number if record.execution == provenance.execution() else None


@contextlib.contextmanager
def _rendezvous(directory: Path) -> Iterator[None]:
    """Name the file of the rendezvous for the trainer, unless torchrun's variables are set."""
    if current_rank().world_size == 1 or os.environ.get("MASTER_ADDR"):
        yield
        return
    with code.variables({RENDEZVOUS: str(directory / "rendezvous.json")}):
        yield


def _checked(run: RunDir, config: Config | None, options: Options) -> Config:
    """The configuration to execute, with the threads of this attempt."""
    own = run.config()
    if config is not None and _run_id(config) != run.run_id:
        raise UserError(f"{run.run_id} is not the run of this configuration, which is {_run_id(config)}")
    threads = {} if options.threads is None else {"runtime.threads": options.threads}
    return (config or own).replace(threads)


def complete(run: RunDir, stage: Stage, config: Config) -> bool:
    """Whether the files say that nothing is left to do of a run's stage."""
    if run.void_file.exists():
        return False
    if stage == "train":
        return run.trained() is not None
    return run.result(evaluation_id(config)) is not None


def _note_lost_predecessors(run: RunDir, number: int) -> None:
    """Write into the records of earlier attempts that did not say how they ended that they were lost."""
    for earlier in run.attempts():
        if earlier < number:
            run.attempt(earlier).conclude(_lost(run, earlier), only_if_open=True)


def _lost(run: RunDir, number: int) -> Ending:
    """What is known of the end of an attempt that did not say how it ended."""
    last = next(reversed(run.attempt(number).events()), None)
    signalled = f" after {last.detail}" if last is not None and last.state == "SIGNAL" else ""
    owner = claims.read(run.claims, number)
    where = f" on {owner.host}" if owner.host else ""
    known = owner.dead()  # None: another machine, which ended as a whole or was taken away
    kind = FailureClass.NODE if known is None and owner.host and not signalled else FailureClass.KILLED
    return Ending(Outcome.LOST, kind, f"the process died{where} and did not say why{signalled}")


class _Attempt:
    """One attempt under a claim."""

    def __init__(
        self, run: RunDir, config: Config, claim: claims.Claim, stage: Stage, options: Options, runner: Runner
    ) -> None:
        self.run, self.config, self.claim, self.stage, self.options = run, config, claim, stage, options
        self.runner = runner
        self.attempt = run.attempt(claim.number)
        self.noted = Noted()
        self.stopping: StopReason | None = None
        self.heartbeat = claims.Heartbeat(claim)
        self._eta_seconds: float | None = None
        self._progress_at = 0.0
        self._progress_seconds = 1.0
        self._stop_at = 0.0
        self._reserve = self.attempt.path / ".reserve"

    def execute(self) -> Ending:
        """Run the stages and record how it ended."""
        try:
            self._begin()
            with self.heartbeat, captured(self.attempt.log, self.options.capture), self.noted.signals():
                ending = self._judged()
            self._end(ending)
            return ending
        except OSError as error:
            line = f"cannot write the attempt's records: {error}"
        _print_error(f"{self.run.run_id}: {line}")
        return Ending(Outcome.FAILED, FailureClass.DISK, line, self.claim.number)

    def _begin(self) -> None:
        self.attempt.path.mkdir(parents=True, exist_ok=True)
        self._progress_seconds = self.attempt.progress_seconds
        self._reserve.write_bytes(os.urandom(RESERVE_BYTES))
        found = self.run.progress_mark()
        execution = provenance.execution()
        self.attempt.begin(
            AttemptRecord(self.stage, time.time(), launch=self.options.launch, execution=execution, found=found)
        )
        origin = provenance.collect(self.config.runtime.threads)
        self.attempt.write_provenance(replace(origin, runtime=self.config.runtime.model_dump()))
        self.attempt.add_event("RUNNING", f"attempt {self.claim.number}, stage {self.stage}")
        self._write_progress("start", {}, at_once=True)
        self._warn_of_other_threads()

    def _end(self, ending: Ending) -> None:
        self._reserve.unlink(missing_ok=True)
        self.attempt.conclude(ending)
        self.attempt.add_event(_EVENTS.get(ending.outcome, ending.outcome.upper()), ending.detail)

    def _judged(self) -> Ending:
        """Run the stages; every way to end becomes an outcome."""
        try:
            return self._stages()
        except Interrupted as stopped:
            return self._stopped(str(stopped))
        except KeyboardInterrupt:  # outside the trainer, which catches its own
            return self._stopped("Ctrl-C")
        except BaseException as error:
            self._reserve.unlink(missing_ok=True)
            ending = failure(error, self.claim.number)
            if ending.failure_class not in (FailureClass.NAN, FailureClass.CLAIM_LOST):
                with contextlib.suppress(OSError):
                    traceback.print_exc()
            _print_error(f"{self.run.run_id}: {ending.failure_class}: {ending.detail}")
            return ending

    def _stopped(self, detail: str) -> Ending:
        """The end of an attempt that was asked to stop, by whoever asked; Ctrl-C asks nobody."""
        outcome = self.stopping.stop.outcome if self.stopping is not None else Outcome.INTERRUPTED
        advice = "" if outcome is Outcome.REQUEUED else "; launch again to continue"
        return Ending(outcome, detail=f"{detail}{advice}", attempt=self.claim.number)

    def _stages(self) -> Ending:
        if self.run.void_file.exists():
            self.run.set_aside()
        if self.stage != "evaluate":
            self._train()
        if self.stage == "train":
            return Ending(Outcome.TRAINED, attempt=self.claim.number)
        self._evaluate()
        return Ending(Outcome.DONE, attempt=self.claim.number)

    def _train(self) -> None:
        if self._weights() is not None:
            return
        callbacks = TrainCallbacks(log=self._log_line, confirm=self._confirm, stop=self._stop, progress=self._progress)
        with _rendezvous(self.attempt.path):
            content = self.runner.train(self.config, self.run.path, self.options.data(self.config), callbacks)
        self._confirm()
        trained = self.run.write_trained(content)
        self.attempt.add_event("TRAINED", f"{trained.iterations} iterations")

    def _weights(self) -> Path | None:
        """The final weights, if they are there and match their checksum; otherwise the training is taken up again."""
        weights = self.run.weights()
        if weights is None and self.run.trained() is not None:
            _print_error("the final weights are missing or damaged: training again from the last sound checkpoint")
            self.run.trained_file.replace(self.attempt.path / "trained.damaged.json")
        return weights

    def _evaluate(self) -> None:
        weights = self._weights()
        if weights is None:
            raise RunFailure("data", "there are no trained weights to evaluate; run the train stage first")
        setting = evaluation_id(self.config)
        out = self.attempt.path / "evaluation" if self.options.anew else self.run.evaluation(setting)
        out.mkdir(parents=True, exist_ok=True)
        self.run.write_setting(out, self.config.evaluation.model_dump(mode="json"))
        self.attempt.add_event("EVALUATING", setting)
        data = self.options.data(self.config)
        content = self.runner.evaluate(self.config, weights, out, data, self._evaluation_progress)
        whose = {"run_id": self.run.run_id, "eval_id": setting, "attempt": self.claim.number}
        result = decode(Result, {**content, **whose}, "the evaluation's result")
        if not result.valid(self.run.run_id, setting):
            raise RunFailure("nan", "the evaluation's result is incomplete or not finite; see the attempt's log")
        self._confirm()
        self._log_final(result)
        self.run.write_result(result, out)
        if self.options.anew:
            _supersede(self.run.evaluation(setting), out, self.run)
        self._drop_checkpoints(weights)

    def _drop_checkpoints(self, weights: Path) -> None:
        """Keep the weights alone of a run that is done."""
        for path in (self.run.path / "checkpoints").glob("iteration_*"):
            if path != weights:
                path.unlink(missing_ok=True)

    def _log_final(self, result: Result) -> None:
        """The final scores are a line of metrics.jsonl too, for MLflow's curves."""
        iteration = self.config.schedule.max_iter if result.iteration is None else result.iteration
        final = {"metrics": dict(result.metrics), "final": True, "eval_id": result.eval_id}
        if final.items() <= next(reversed(self.run.scored()), {}).items():
            return
        self._log_line({"kind": "evaluation", "iteration": iteration, "time": time.time(), **final})

    # what the trainer calls back

    def _log_line(self, line: Mapping[str, Any]) -> None:
        """Into metrics.jsonl, and as a line to read into the log: ``mpformer logs -f`` shows how training goes."""
        append_json(self.run.metrics, line)
        _log.info("%s", line_of(line, self.config.schedule.max_iter, self._eta_seconds))

    def _confirm(self) -> None:
        """Before a checkpoint counts: the run is still this process's, and the lines up to here are on the disk."""
        self.claim.confirm()
        sync(self.run.metrics)

    def _stop(self) -> str | None:
        """Why to stop, if there is a reason; the files are looked at twice a second at most."""
        if self.heartbeat.lost:
            self.claim.confirm()
        self.stopping = self.noted.reason() or self._asked_to_stop()
        return None if self.stopping is None else str(self.stopping)

    def _asked_to_stop(self) -> StopReason | None:
        now = time.monotonic()
        if now - self._stop_at < 0.5:
            return None
        self._stop_at = now
        if self.run.cancel_file.exists():
            return StopReason(Stop.CANCELLED, "by the user")
        return stop_reason(self.options.stop_file) if self.options.stop_file is not None else None

    def _progress(self, values: Mapping[str, Any]) -> None:
        self._eta_seconds = values.get("eta_seconds")
        self._write_progress("train", values, at_once=values.get("iteration") == values.get("max_iter"))

    def _evaluation_progress(self, values: Mapping[str, Any]) -> None:
        reason = self._stop()
        if reason:
            raise Interrupted(reason, self.config.schedule.max_iter)
        self._write_progress("evaluate", values)

    def _write_progress(self, stage: str, values: Mapping[str, Any], at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._progress_at >= self._progress_seconds:
            self._progress_at = now
            with contextlib.suppress(OSError, ValueError):  # a picture of progress is not worth a run
                self.attempt.write_progress({"stage": stage, **values})

    def _warn_of_other_threads(self) -> None:
        now = self.config.runtime.threads
        origins = [self.run.attempt(number).provenance() for number in self.run.attempts()]
        others = {origin.threads for origin in origins if origin is not None} - {now, None}
        if others:
            self.attempt.add_event("WARNING", f"earlier attempts ran with {others} threads, this one with {now}")


_EVENTS = {Outcome.INTERRUPTED: "CANCELLED"}
"""Events of outcomes that are not called as they are."""


def failure(error: BaseException, attempt: int = 0) -> Ending:
    """Return the ending that an exception means: its failure class and one line."""
    line = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, RunFailure):
        return Ending(Outcome.FAILED, FailureClass.of(error.failure_class), line, attempt)
    kind = _failure_class(error)
    if kind is FailureClass.ERROR and failures.classify(line).kind is FailureClass.GPU:
        return gpu_failure(line, attempt)
    return Ending(Outcome.FAILED, kind, f"{type(error).__name__}: {line}", attempt)


def gpu_failure(line: str, attempt: int) -> Ending:
    """Return the ending that an error of a GPU means: the attempt is lost, by no fault of the run's, on this node."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Ending(Outcome.LOST, FailureClass.GPU, f"{line} (on {node})", attempt)


def _failure_class(error: BaseException) -> FailureClass:
    for kind, found in _CLASSES:
        if isinstance(error, kind):
            return found
    return FailureClass.OOM if type(error).__name__ == "OutOfMemoryError" else FailureClass.ERROR


_CLASSES: tuple[tuple[type[BaseException], FailureClass], ...] = (
    (UserError, FailureClass.CONFIG),
    (ImportError, FailureClass.IMPORT),
    (MemoryError, FailureClass.OOM),
    (FloatingPointError, FailureClass.NAN),
    (FileNotFoundError, FailureClass.DATA),
    (OSError, FailureClass.DISK),
    (SystemExit, FailureClass.KILLED),
)


def _supersede(current: Path, new: Path, run: RunDir) -> None:
    """Put a complete evaluation where an earlier one is, which is moved to ``superseded/<n>`` and kept."""
    if current.exists():
        number = 1 + sum(1 for _ in (run.path / "superseded").glob("*"))
        aside = run.path / "superseded" / str(number) / current.name
        aside.parent.mkdir(parents=True)
        current.rename(aside)
    current.parent.mkdir(exist_ok=True)
    new.rename(current)


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
