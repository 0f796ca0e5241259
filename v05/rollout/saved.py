"""The tokens of steps in flight as tensors: as JSON each would take a hundred bytes and microseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from v05.rollout.engine import Rollout
from v05.rollout.step import Step


def tokens_of(steps: Sequence[Step]) -> dict[str, Tensor]:
    """Return the numbers of all prompts and finished rollouts end to end, by name, and how many each has."""
    groups = [group for step in steps for group in step.groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts.values()]
    columns: dict[str, tuple[torch.dtype, Sequence[Sequence[float]]]] = {
        "prompt_ids": (torch.int64, [group.prompt_ids for group in groups]),
        "token_ids": (torch.int64, [rollout.token_ids for rollout in rollouts]),
        "logprobs": (torch.float64, [rollout.logprobs for rollout in rollouts]),
        "versions": (torch.int64, [rollout.versions for rollout in rollouts]),
    }
    found = {name: torch.tensor(list(chain.from_iterable(rows)), dtype=kind) for name, (kind, rows) in columns.items()}
    return found | {f"{name}_lengths": torch.tensor(list(map(len, rows))) for name, (_, rows) in columns.items()}


def steps_of(states: Sequence[Mapping[str, Any]], tokens: Mapping[str, Tensor]) -> list[Step]:
    """Return the steps whose `Step.state` and `tokens_of` these are."""
    steps = [Step.from_state(state) for state in states]
    prompts, token_ids, logprobs, versions = (
        _rows(tokens, name) for name in ("prompt_ids", "token_ids", "logprobs", "versions")
    )
    for group in (group for step in steps for group in step.groups):
        group.prompt_ids = next(prompts)
        for place, rollout in group.rollouts.items():
            numbers = (next(token_ids), next(logprobs))
            group.rollouts[place] = Rollout(group.prompt_ids, *numbers, rollout.text, rollout.finished, next(versions))
    return steps


def _rows(tokens: Mapping[str, Tensor], name: str) -> Iterator[tuple[Any, ...]]:
    return (tuple(row.tolist()) for row in tokens[name].split(tokens[f"{name}_lengths"].tolist()))
