"""Rollouts of one process while a batch grows, and how rows of prompts are dealt out to processes and to steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """R completions of this process, and the rewards of all W processes.

    Attributes:
        inputs: the dataset's row of each completion, R.
        prompt_ids: token ids, R lists.
        completion_ids: token ids, R lists.
        completions: as reward functions take them, R.
        tool_mask: 1 where a token is the model's, R lists, or None.
        logprobs: as the sampler reported them, R lists, or None.
        rewards: by process and reward function, [W, R, F] float32.
        group: the prompt of each completion, [W, R] int64.
    """

    inputs: list[dict[str, Any]]
    prompt_ids: list[Any]
    completion_ids: list[Any]
    completions: list[Any]
    tool_mask: list[Any] | None
    logprobs: list[Any] | None
    rewards: Tensor
    group: Tensor

    def __add__(self, more: Rollouts) -> Rollouts:
        """Return both, this one's rows first on every process."""
        return Rollouts(
            inputs=self.inputs + more.inputs,
            prompt_ids=list(self.prompt_ids) + list(more.prompt_ids),
            completion_ids=list(self.completion_ids) + list(more.completion_ids),
            completions=list(self.completions) + list(more.completions),
            tool_mask=_joined(self.tool_mask, more.tool_mask),
            logprobs=_joined(self.logprobs, more.logprobs),
            rewards=torch.cat([self.rewards, more.rewards], dim=1),
            group=torch.cat([self.group, more.group], dim=1),
        )


def _joined(first: list[Any] | None, second: list[Any] | None) -> list[Any] | None:
    return None if first is None or second is None else list(first) + list(second)


def with_fields(inputs: Sequence[dict[str, Any]], fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return copies of dataset rows with what a rollout function returned beside its tokens, as TRL puts it there."""
    rows = [dict(row) for row in inputs]
    for key, values in fields.items():
        for i, row in enumerate(rows):
            if not isinstance(values, list):
                row[key] = values
            elif i < len(values):
                row[key] = values[i]
    return rows


def split_rows(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    """Deal the rows of a batch out to `parts` steps at random, nearly as many to each; scalars go to all.

    Steps may differ by one row, so a loss must divide by the rows of the batch, not by those of its step.
    """
    rows = len(batch["advantages"])
    permutation = torch.randperm(rows)
    bounds = [rows * part // parts for part in range(parts + 1)]
    chosen = [permutation[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [
        {name: value if value.dim() == 0 else value[own.to(value.device)] for name, value in batch.items()}
        for own in chosen
    ]


def in_pieces(step: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Cut the rows of a step into the fewest pieces of at most `most` rows.

    Pieces hold `step_tokens` too, the tokens of the whole step that are learnt from.
    """
    rows = len(step["advantages"])
    if rows <= most:
        return [step]
    whole = {name: value for name, value in step.items() if value.dim() == 0} | {"step_tokens": learnt_from(step).sum()}
    size = -(-rows // -(-rows // most))
    cut = {name: value.split(size) for name, value in step.items() if value.dim()}
    return [whole | dict(zip(cut, piece, strict=True)) for piece in zip(*cut.values(), strict=True)]


def learnt_from(step: dict[str, Tensor]) -> Tensor:
    """Return which completion tokens are learnt from, [B, L], as TRL's masks say."""
    inside = step["completion_mask"]
    return inside * step["tool_mask"] if "tool_mask" in step else inside


def merged_lengths(metrics: dict[str, list[float]], rows: Sequence[int]) -> None:
    """Merge the last entries of TRL's length metrics, one per round of generation, into one over all rows.

    Args:
        metrics: TRL's, by name; changed in place.
        rows: completions of each round.
    """
    rounds = len(rows)
    clipped = metrics["completions/clipped_ratio"][-rounds:]
    ended = [count * (1 - share) for count, share in zip(rows, clipped, strict=True)]
    for part, weights in (("", rows), ("terminated_", ended)):
        some = [i for i in range(rounds) if weights[i] > 0] or [0]
        for name, merge in (("mean", None), ("min", min), ("max", max)):
            entries = metrics[f"completions/{name}_{part}length"]
            last = [entries[-rounds:][i] for i in some]
            total = max(sum(weights[i] for i in some), 1e-9)
            mean = sum(weights[i] * value for i, value in zip(some, last, strict=True)) / total
            entries[-rounds:] = [mean if merge is None else merge(last)]
    total = sum(rows)
    metrics["completions/clipped_ratio"][-rounds:] = [1 - sum(ended) / total]
