"""One training run in its folder: warm start, updates, evaluations, checkpoints, summary."""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from v05.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from v05.errors import InputError
from v05.files import write_json, write_text
from v05.plots.training import plot_run
from v05.rollout.engine import Engine
from v05.stop import Interrupted, StopRequest
from v05.tasks import make_task
from v05.training.changes import check_data, make_changes, way_out
from v05.training.config import TrainConfig
from v05.training.engines import close_engine, make_engine, streaming
from v05.training.loss_config import PLAIN, LossConfig
from v05.training.metrics import accuracies, append_line, read_metrics, total_of, truncate_metrics, worth
from v05.training.model_config import ModelConfig
from v05.training.priors import make_prior
from v05.training.ranks import ALONE, Ranks
from v05.training.run_folder import alone_in, prepare_folder, read_summary, remove_files
from v05.training.sampler_gap import GapWatch
from v05.training.sampling import Stopped
from v05.training.settings import Settings
from v05.training.stream_config import BATCHES, StreamConfig
from v05.training.trainer import Trainer
from v05.training.user_model import load_user_model
from v05.training.warm_start import warm_start


class Reporter(Protocol):
    """Shows progress."""

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` units of `stage` are done; `note` says what was measured last."""
        ...


@dataclass
class Clock:
    """Seconds of a run over all its sessions: on the clock, and of the processor's time for updates alone."""

    before: float = 0.0
    updating: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Return the seconds so far."""
        return self.before + time.monotonic() - self.started


def train_run(
    config: TrainConfig,
    folder: Path,
    cache: Path,
    stop: StopRequest,
    report: Reporter,
    *,
    resume: bool = False,
    changes: bool = False,
    model: ModelConfig | None = None,
    stream: StreamConfig = BATCHES,
    loss: LossConfig = PLAIN,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train one policy, or go on with a run that was stopped, and return its summary.

    Args:
        config: the settings.
        folder: of this run; made where missing.
        cache: folder of warm starts.
        stop: looked at after every update.
        report: shows progress.
        resume: go on from the newest checkpoint in `folder`; start anew where there is none.
        changes: settings that may change when a run is resumed may; see `v05.training.changes`.
        model: a model and data of the user's; None for the task and the small policy that `config` names.
        stream: how rollouts are sampled.
        loss: its options.
        ranks: processes that train a model of the user's together; the first of them writes.

    Returns:
        The summary, as in `summary.json`.

    Raises:
        Interrupted: a stop was asked for; everything is saved.
        InputError: an unknown name; the folder has a run and `resume` is false; `config` differs from the settings of
            the run to resume; or another process is at work in the folder.
    """
    if ranks.count > 1 and model is None:
        raise InputError(f"{ranks.count} processes are given; allowed for the embedded tasks: 1")
    settings = Settings(config, model, stream, loss)
    if ranks.leads:
        prepare_folder(settings, folder, resume, changes)
    with alone_in(folder) if ranks.leads else contextlib.nullcontext():
        if ranks.leads:
            make_changes(settings, folder, changes)
        finished = ranks.broadcast(read_summary(folder) if (folder / "summary.json").exists() else None)
        if finished is not None:
            return finished
        try:
            if model is None:
                trainer = make_trainer(config, cache, stop, report, stream, loss)
            else:
                trainer = make_user_trainer(config, model, folder, stream, loss, ranks)
            try:
                return _train(trainer, folder, stop, report)
            finally:
                trainer.grader.close()
                close_engine(trainer.team.engine)
        except InputError:
            if ranks.leads and not (folder / "checkpoints").exists():
                remove_files(folder)  # so that the next try, with the mistake mended, need not say --overwrite
            raise


def _train(trainer: Trainer, folder: Path, stop: StopRequest, report: Reporter) -> dict[str, Any]:
    """Go on from the newest checkpoint, or start, and return the summary."""
    checkpoint = read_checkpoint(folder / "checkpoints")
    found = trainer.ranks.gather(None if checkpoint is None else checkpoint.update)
    if len(set(found)) > 1:
        raise InputError(
            f"the processes find checkpoints {found} in {folder}; allowed: a folder that all of them share"
        )
    clock = Clock()
    if checkpoint is None:
        if trainer.ranks.leads:
            for name in ("metrics.jsonl", "times.jsonl"):
                write_text(folder / name, "")
        _evaluate(trainer, folder, {"update": 0, "rollouts": 0}, clock)
        _save(trainer, folder, clock)
    else:
        trainer.load_state(checkpoint.tensors, checkpoint.state["counters"])
        clock.before, clock.updating = checkpoint.state["seconds"], checkpoint.state["updating"]
        if trainer.ranks.leads:
            for name in ("metrics.jsonl", "times.jsonl"):
                truncate_metrics(folder / name, checkpoint.update)
    try:
        _loop(trainer, folder, clock, stop, report)
    except FloatingPointError as error:
        raise InputError(f"{error}; {way_out(folder)}") from None
    return _finish(trainer, folder, clock)


def make_trainer(
    config: TrainConfig,
    cache: Path,
    stop: StopRequest,
    report: Reporter,
    stream: StreamConfig = BATCHES,
    loss: LossConfig = PLAIN,
) -> Trainer:
    """Return a trainer at the warm start that `config` describes."""

    def on_step(done: int, total: int, loss: float) -> None:
        report("warm start", done, total, f"loss {loss:.3f}")
        if stop.requested:
            raise Interrupted("stopped during the warm start, which starts over next time")

    task = make_task(config.task)
    policy = warm_start(config, task, cache, on_step)
    engine = make_engine("hf", policy)
    prior = make_prior(config, task.reward_range)
    sampler = streaming(engine) if stream.streams else engine
    return Trainer(config, policy, task, sampler, prior, stream=stream, loss=loss)


def make_user_trainer(
    config: TrainConfig,
    model: ModelConfig,
    folder: Path,
    stream: StreamConfig = BATCHES,
    loss: LossConfig = PLAIN,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Return a trainer of the user's model on the user's data, which must be that of the run in the folder, if any."""
    policy, task, grader = load_user_model(model)
    check_data(folder, task, model.data, ranks)
    if model.engine != "hf" and ranks.count > 1 and not stream.streams:
        raise InputError(f"mode is {stream.mode!r} with {ranks.count} processes; allowed for {model.engine}: stream")
    prior = make_prior(config, task.reward_range)
    engine = None
    if ranks.leads or (model.engine == "hf" and not stream.streams):  # else the leader's samples for all ranks
        longest = model.max_prompt_tokens + model.max_new_tokens
        own: dict[str, Any] = {"dtype": model.dtype, "longest": longest, "options": json.loads(model.engine_options)}
        engine = make_engine(model.engine, policy, model.sequences_at_once, model=model.model, **own)
    options: dict[str, Any] = {"grader": grader, "linear": model.loss == "linear", "stream": stream}
    sampler = streaming(engine) if stream.streams and engine is not None else engine
    try:
        return Trainer(config, policy, task, cast(Engine, sampler), prior, loss=loss, ranks=ranks, **options)
    except BaseException:
        close_engine(engine)
        raise


def _loop(trainer: Trainer, folder: Path, clock: Clock, stop: StopRequest, report: Reporter) -> None:
    """Update until all rollouts are spent, evaluating, saving and reporting on the way."""
    config, counters = trainer.config, trainer.counters
    leads, watch = trainer.ranks.leads, GapWatch()
    accuracy = accuracies(read_metrics(folder))[1][-1] if leads else 0.0
    if trainer.ranks.count == 1:
        trainer.stopped = lambda: stop.requested
    while not trainer.done:
        before = counters.rollouts
        started = time.process_time()
        try:
            metrics = trainer.update()
        except Stopped:
            _save(trainer, folder, clock)
            raise Interrupted(progress_of(trainer, folder)) from None
        clock.updating += time.process_time() - started
        if leads:
            watch.see(metrics)
        if trainer.done or counters.rollouts // config.eval_every > before // config.eval_every:
            accuracy = _evaluate(trainer, folder, metrics, clock)
        else:
            _note(trainer, folder / "metrics.jsonl", metrics)
        dropped = f", {counters.dropped / counters.rollouts:.0%} dropped" if counters.dropped else ""
        report(trainer.algorithm.name, counters.rollouts, config.rollouts, f"held-out {accuracy:.1%}{dropped}")
        stopping = trainer.ranks.broadcast(stop.requested)
        if trainer.done or stopping or counters.update % config.checkpoint_every == 0:
            _save(trainer, folder, clock)
        if stopping and not trainer.done:
            raise Interrupted(progress_of(trainer, folder))


def progress_of(trainer: Trainer, folder: Path) -> str:
    """Return how far a saved run is."""
    return f"saved in {folder} after {trainer.counters.rollouts:,} of {trainer.config.rollouts:,} rollouts"


def _evaluate(trainer: Trainer, folder: Path, metrics: Mapping[str, Any], clock: Clock) -> float:
    """Write held-out answers to metrics.jsonl, which every equal run repeats, and what they took to times.jsonl."""
    found = trainer.evaluate()
    noted = {f"heldout_{name}": value for name, value in found._asdict().items()}
    troubles = trainer.grader.take_troubles()
    noted |= {"heldout_failures": troubles.failures, "heldout_timeouts": troubles.timeouts}
    _note(trainer, folder / "metrics.jsonl", {**metrics, **noted})
    when = {"update": metrics["update"], "rollouts": metrics["rollouts"], "seconds": round(clock.updating, 3)}
    _note(trainer, folder / "times.jsonl", when)
    return found.right / found.total


def _note(trainer: Trainer, file: Path, line: Mapping[str, Any]) -> None:
    if trainer.ranks.leads:
        append_line(file, line)


def _save(trainer: Trainer, folder: Path, clock: Clock) -> None:
    tensors, counters = trainer.state()
    state = {"counters": counters, "seconds": clock.seconds, "updating": clock.updating}
    if trainer.ranks.leads:
        write_checkpoint(folder / "checkpoints", Checkpoint(trainer.counters.update, tensors, state))


def _finish(trainer: Trainer, folder: Path, clock: Clock) -> dict[str, Any]:
    """Export the policy, draw the curves, and write and return the summary."""
    weights = trainer.learner.weights()
    return trainer.ranks.broadcast(_export(trainer, folder, clock, weights) if trainer.ranks.leads else {})


def _export(trainer: Trainer, folder: Path, clock: Clock, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    counters, metrics = trainer.counters, read_metrics(folder)
    evaluated = [line for line in metrics if line.get("heldout_right") is not None]
    trainer.policy.save(folder / "policy", weights)
    summary = {
        "algorithm": trainer.algorithm.name,
        "seed": trainer.config.seed,
        "parameters": trainer.policy.parameters,
        "heldout_before": [evaluated[0]["heldout_right"], evaluated[0]["heldout_total"]],
        "heldout_after": [evaluated[-1]["heldout_right"], evaluated[-1]["heldout_total"]],
        "heldout_worth": [worth(evaluated[0]), worth(evaluated[-1])],
        "rollouts": counters.rollouts,
        "prompts": counters.groups,
        "rollouts_per_prompt": counters.kept / max(1, counters.groups),
        "conflicts": counters.conflicts if trainer.prior is not None else None,
        "dropped": counters.dropped,
        "reward_failures": total_of(metrics, "reward_failures", "heldout_failures"),
        "reward_timeouts": total_of(metrics, "reward_timeouts", "heldout_timeouts"),
        "updates": counters.update,
        "seconds": clock.seconds,
    }
    plot_run(metrics, trainer.algorithm.name, folder / "curves.png")
    write_json(folder / "summary.json", summary)
    return summary
