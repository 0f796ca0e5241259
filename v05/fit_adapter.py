"""Training of V0's adapter on scored records in a folder: steps, checkpoints, metrics on prompts held out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v05.checkpoint import (
    Checkpoint,
    optimizer_entries,
    optimizer_tensors,
    read_checkpoint,
    write_checkpoint,
)
from v05.checks import FROM_ONE, POSITIVE, check, check_each
from v05.errors import InputError
from v05.files import finite, write_json, write_text
from v05.stop import StopRequest
from v05.studies.prior import Outcomes, Scores
from v05.value.adapter import QUERIES, QueryAdapter, save_adapter
from v05.value.adapter_training import AdapterTrainer, DifferentiableHead, draw_episode, evaluate
from v05.value.measure import grouped_auc, pair_accuracy

MODEL = "adapter"


@dataclass(frozen=True)
class FitConfig:
    """Settings of `v05 fit-adapter`; two runs with equal settings, records and threads are equal bit for bit.

    Attributes:
        steps: of AdamW.
        learning_rate: after the warm-up of 5 %, falling to 0 as a cosine.
        context: outcomes in a context.
        pairs: of solved and failed prompts in a step.
        queries: of the adapter.
        seed: of weights, episodes and dropout.
        eval_every: steps between evaluations, after which a checkpoint is written.
    """

    steps: int = 400
    learning_rate: float = 2e-4
    context: int = 128
    pairs: int = 16
    queries: int = QUERIES
    seed: int = 0
    eval_every: int = 100

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        check_each(self, ("steps", "context", "pairs", "queries", "eval_every"), FROM_ONE)
        check("learning_rate", self.learning_rate, *POSITIVE)


@dataclass(frozen=True)
class Records:
    """What is learnt from and judged on.

    Attributes:
        data: every record; the prompts of fold 0 are held out from training under every policy.
        states: token states [T, D] of each distinct prompt.
        steps: age of each policy in updates, for AUC over steps.
        source: what else decides the run, for resuming: backbone, head and records.
    """

    data: Outcomes
    states: list[Tensor]
    steps: list[int]
    source: str

    def part(self, policy: int, heldout: bool) -> np.ndarray:
        """Return one policy's records, those of prompts held out or the others, as row numbers."""
        own = self.data.policy == policy
        return np.flatnonzero(own & ((self.data.fold[self.data.prompt] == 0) == heldout))

    def training(self) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Return token states and success rates of each policy's training records."""
        rows = [self.part(policy, heldout=False) for policy in range(len(self.data.policies))]
        states = [[self.states[number] for number in self.data.prompt[part]] for part in rows]
        return states, [torch.from_numpy(self.data.rate[part]).float() for part in rows]


def fit_adapter(
    config: FitConfig,
    records: Records,
    head: DifferentiableHead,
    folder: Path,
    stop: StopRequest,
    on_step: Callable[[int, str], None] = lambda done, note: None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train an adapter, or go on with a run that was stopped, and return the last metrics.

    Args:
        config: the settings.
        records: what is learnt from.
        head: frozen and differentiable.
        folder: of the run; `adapter.safetensors` is written there at the end.
        stop: looked at after every step.
        on_step: told the steps done and what was measured last.
        resume: go on from the newest checkpoint in `folder`.

    Returns:
        The line of metrics.jsonl at the last step reached; `step` tells which that is.

    Raises:
        InputError: no policy has outcomes of both kinds to learn from; the folder has a run and `resume` is false, or
            that run has other settings.
    """
    states, rates = records.training()
    if all(draw_episode(rate.tolist(), config.context, config.pairs, 0) is None for rate in rates):
        raise InputError("no policy has two solved and two failed prompts to train on; allowed: one or more that have")
    prepare(config, records, folder, resume)
    torch.manual_seed(config.seed)
    adapter = QueryAdapter(records.states[0].shape[1], config.queries)
    trainer = AdapterTrainer(adapter, head, config.learning_rate, config.steps, config.seed)
    checkpoint = read_checkpoint(folder / "checkpoints")
    metrics: list[dict[str, Any]] = []
    if checkpoint is None:
        metrics = [judge(trainer, records, config.context, None)]
    else:
        load(trainer, checkpoint)
        metrics = checkpoint.state["metrics"]
    write_metrics(folder, metrics)
    losses: list[float] = [] if checkpoint is None else checkpoint.state["losses"]
    note = describe(metrics[-1])
    while trainer.done < config.steps:
        loss = trainer.step(states, rates, config.context, config.pairs)
        losses += [] if loss is None else [loss]
        if trainer.done % config.eval_every == 0 or trainer.done == config.steps:
            metrics.append(judge(trainer, records, config.context, float(np.mean(losses)) if losses else None))
            losses, note = [], describe(metrics[-1])
            write_metrics(folder, metrics)
            save(trainer, metrics, losses, folder)
        on_step(trainer.done, note)
        if stop.requested and trainer.done < config.steps:
            save(trainer, metrics, losses, folder)
            return {**metrics[-1], "step": trainer.done}
    save_adapter(adapter, folder / "adapter.safetensors")
    return metrics[-1]


def check_new(folder: Path, resume: bool) -> None:
    """Raise InputError where the folder has a run that is not to be gone on with."""
    if (folder / "config.json").exists() and not resume:
        raise InputError(f"{folder} has a run already; go on with --resume, or name another folder")


def prepare(config: FitConfig, records: Records, folder: Path, resume: bool) -> None:
    """Make the folder, or check that the run in it is the one to resume."""
    settings = {**asdict(config), "source": records.source}
    file = folder / "config.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    check_new(folder, resume)
    saved = json.loads(file.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if value != saved.get(name):
            raise InputError(f"{name} is {value!r}; allowed when resuming {folder}: {saved.get(name)!r}")


def judge(trainer: AdapterTrainer, records: Records, size: int, loss: float | None) -> dict[str, Any]:
    """Return the metrics on prompts held out: each policy's are predicted from its own training records."""
    data, predictions = records.data, np.full(len(records.data.rate), np.nan)
    states, rates = records.training()
    for policy in range(len(data.policies)):
        rows = records.part(policy, heldout=True)
        if len(rows) and len(rates[policy]) > 1:
            wanted = [records.states[number] for number in data.prompt[rows]]
            found = evaluate(trainer.adapter, trainer.head, (states[policy], rates[policy]), wanted, size)
            predictions[rows] = found.numpy()
    known = np.flatnonzero(~np.isnan(predictions))
    part = Outcomes(data.policies, data.prompts, data.policy[known], data.prompt[known], data.rate[known], data.fold)
    return {"step": trainer.done, "loss": loss, **measures(part, predictions[known], records.steps)}


def measures(data: Outcomes, prediction: np.ndarray, steps: Sequence[int]) -> dict[str, float | None]:
    """Return AUC within a policy, AUC over policies of the same step, pair accuracy and residual correlations."""
    scores = Scores(data, {MODEL: prediction}, 1.0)
    present = [policy for policy in range(len(data.policies)) if (data.policy == policy).any()]
    rows = [data.policy == policy for policy in present]
    success = data.rate >= 0.5
    with_mean, with_difficulty = scores.residual_correlations(MODEL)
    ordered = np.array([pair_accuracy(prediction[own], data.rate[own]) for own in rows])
    ordered = ordered[~np.isnan(ordered)]  # a policy whose rates are all alike has no pair
    values = {
        "auc": grouped_auc(prediction, success, data.policy),
        "gauc": grouped_auc(prediction, success, np.array(steps)[data.policy]),
        "pair_accuracy": float(ordered.mean()) if len(ordered) else math.nan,
        "squared_error": float(np.mean((prediction - data.rate) ** 2)),
        "residual_correlation_with_context_mean": with_mean,
        "residual_correlation_with_difficulty": with_difficulty,
    }
    found: dict[str, float | None] = finite(values)
    return found


def describe(metrics: dict[str, Any]) -> str:
    """Return the last measurement for the progress line."""
    auc = metrics["auc"]
    return "AUC -" if auc is None else f"AUC {auc:.3f}"


def write_metrics(folder: Path, metrics: Sequence[dict[str, Any]]) -> None:
    """Write metrics.jsonl whole."""
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))


def save(trainer: AdapterTrainer, metrics: list[dict[str, Any]], losses: list[float], folder: Path) -> None:
    """Write a checkpoint."""
    tensors = {"adapter": trainer.adapter.state_dict(), "optimizer": optimizer_tensors(trainer.optimizer)}
    state = {"metrics": metrics, "losses": losses}
    write_checkpoint(folder / "checkpoints", Checkpoint(trainer.done, tensors, state))


def load(trainer: AdapterTrainer, checkpoint: Checkpoint) -> None:
    """Go on from a checkpoint."""
    trainer.adapter.load_state_dict(checkpoint.tensors["adapter"])
    entries = optimizer_entries(checkpoint.tensors["optimizer"])
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": entries})
    trainer.done = checkpoint.update
