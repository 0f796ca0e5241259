"""A budget rule over the groups of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.rollout.budget import BudgetRule
from v05.rollout.step import Group


def first(rule: BudgetRule, groups: Sequence[Group]) -> list[int]:
    """Return the rollouts that the new groups of a step start with."""
    counts: list[int] = rule.first(_prior(groups)).tolist()
    return counts


def more(rule: BudgetRule, groups: Sequence[Group]) -> list[tuple[int, float]]:
    """Return how many more rollouts each group wants, and what the next one is worth."""
    ask = rule.more(*_ragged(groups))
    return list(zip(ask.more.tolist(), ask.gain.tolist(), strict=True))


def learn(rule: BudgetRule, groups: Sequence[Group]) -> None:
    """Let a rule take in the groups of a finished step."""
    rule.learn(*_ragged(groups))


def _ragged(groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards [N], offsets [G + 1] and priors [G]."""
    rewards = [[group.rewards[place] for place in group.in_order] for group in groups]
    flat = torch.tensor([value for row in rewards for value in row], dtype=torch.float32)
    return flat, offsets_of([len(row) for row in rewards]), _prior(groups)


def _prior(groups: Sequence[Group]) -> Tensor:
    return torch.tensor([group.prior for group in groups], dtype=torch.float32)
