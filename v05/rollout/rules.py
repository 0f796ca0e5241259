"""Budget rules over groups: one rule for all prompts, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.rollout.budget import BudgetRule
from v05.rollout.step import Group


class Rules:
    """Asks the rule of every group; groups with the same rule are asked for in one call."""

    def __init__(self, rule: BudgetRule, rule_of: Callable[[str], BudgetRule] | None = None) -> None:
        """Go by `rule_of(prompt)` where it is given, by `rule` where not."""
        self.rule, self.rule_of = rule, rule_of

    def first(self, groups: Sequence[Group]) -> list[int]:
        """Return the rollouts that the new groups of a step start with."""
        first = [0] * len(groups)
        for rule, rows in self._by_rule(groups):
            prior = torch.tensor([groups[row].prior for row in rows], dtype=torch.float32)
            for row, count in zip(rows, rule.first(prior).tolist(), strict=True):
                first[row] = count
        return first

    def more(self, groups: Sequence[Group]) -> list[tuple[int, float]]:
        """Return how many more rollouts each group wants, and what the next one is worth."""
        wishes = [(0, 0.0)] * len(groups)
        for rule, rows in self._by_rule(groups):
            ask = rule.more(*_ragged([groups[row] for row in rows]))
            for row, more, gain in zip(rows, ask.more.tolist(), ask.gain.tolist(), strict=True):
                wishes[row] = (more, gain)
        return wishes

    def learn(self, groups: Sequence[Group]) -> None:
        """Let every rule take in its groups of a finished step."""
        for rule, rows in self._by_rule(groups):
            rule.learn(*_ragged([groups[row] for row in rows]))

    def _by_rule(self, groups: Sequence[Group]) -> list[tuple[BudgetRule, list[int]]]:
        if self.rule_of is None:
            return [(self.rule, list(range(len(groups))))] if groups else []
        rows: dict[int, tuple[BudgetRule, list[int]]] = {}
        for row, group in enumerate(groups):
            rule = self.rule_of(group.prompt)
            rows.setdefault(id(rule), (rule, []))[1].append(row)
        return list(rows.values())


def _ragged(groups: Sequence[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards [N], offsets [G + 1] and priors [G]."""
    rewards = [[group.rewards[place] for place in group.in_order] for group in groups]
    flat = torch.tensor([value for row in rewards for value in row], dtype=torch.float32)
    prior = torch.tensor([group.prior for group in groups], dtype=torch.float32)
    return flat, offsets_of([len(row) for row in rewards]), prior
