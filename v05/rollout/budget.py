"""Who gets how many rollouts: rules that divide a step's budget, before the first rollout and after each test."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from v05.kernels import Shrinkage, shrinkage
from v05.kernels.shrinkage.rules import make_budget


class Ask(NamedTuple):
    """What groups want next.

    Attributes:
        more: rollouts that each group wants now, 0 or more, [G] int64.
        gain: what the next one is worth to each group, in one unit for all, [G] float.
    """

    more: Tensor
    gain: Tensor


class BudgetRule(Protocol):
    """Decides from priors alone how groups start, and from finished rollouts how they go on."""

    reward_range: tuple[float, float]

    def first(self, prior: Tensor) -> Tensor:
        """Return the rollouts that the new prompts of a step start with, [G] int64, from expected rewards [G]."""
        ...

    def more(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Ask:
        """Return what groups want whose rollouts are all in.

        Args:
            rewards: of these groups, one after the other, [N] float32.
            offsets: of the groups, [G + 1] int64.
            prior: expected rewards, [G] float32.
        """
        ...

    def learn(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> None:
        """Take in all groups of a finished step."""
        ...


class _Forgetful:
    """A rule that carries nothing from step to step."""

    def learn(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> None:
        """Take in nothing."""


@dataclass
class Fixed(_Forgetful):
    """The same number for every prompt, as GRPO does."""

    rollouts: int
    reward_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        """Raise ValueError for fewer than one rollout."""
        _at_least("rollouts", self.rollouts, 1)

    def first(self, prior: Tensor) -> Tensor:
        """Return `rollouts` for every prompt."""
        return torch.full((len(prior),), self.rollouts)

    def more(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Ask:
        """Return that nobody wants more."""
        return _nothing(prior)


@dataclass
class LookAhead:
    """V0.5's rule: more where prior and rollouts conflict, as many as the planned look-ahead says.

    Source: arXiv 2603.10848, section 4.

    Attributes:
        k_init: rollouts that every prompt starts with.
        k_max: rollouts that it may grow to.
        cost: price of a rollout, in units of the largest variance of a reward.
        fusion: `v05` or `calibrated`, see `v05.kernels.shrinkage`.
        reward_range: smallest and largest reward.
        state: of calibrated fusion, from the steps so far; None before the first.
    """

    k_init: int = 4
    k_max: int = 16
    cost: float = 1 / 256
    fusion: Literal["v05", "calibrated"] = "v05"
    reward_range: tuple[float, float] = (-1.0, 1.0)
    state: Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for what `shrinkage` does not allow."""
        _at_least("k_init", self.k_init, 1)
        _at_least("k_max", self.k_max, self.k_init)
        make_budget(self.reward_range, self.cost, self.k_init, self.k_max)

    def first(self, prior: Tensor) -> Tensor:
        """Return `k_init` for every prompt."""
        return torch.full((len(prior),), self.k_init)

    def more(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Ask:
        """Return what one batched `shrinkage` call plans."""
        test = self._test(rewards, offsets, prior)
        return Ask(torch.where(test.roll_out_more, test.planned - test.count, 0).clamp(min=0), test.gain)

    def learn(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> None:
        """Refit the mixture of calibrated fusion."""
        if self.fusion == "calibrated" and len(prior):
            self.state = self._test(rewards, offsets, prior).state

    def _test(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Shrinkage:
        sizes = dict(cost=self.cost, k_init=self.k_init, k_max=self.k_max, fusion=self.fusion, state=self.state)
        return shrinkage(rewards, offsets, prior, reward_range=self.reward_range, **sizes)  # type: ignore[arg-type]


@dataclass
class Allocation(_Forgetful, ABC):
    """A budget given out before any rollout, each next one where the prior says that it gains most.

    Attributes:
        mean_rollouts: rollouts per prompt that a step has.
        reward_range: smallest and largest reward.
        smallest: rollouts of a prompt at least.
        largest: at most.
    """

    mean_rollouts: float
    reward_range: tuple[float, float] = (-1.0, 1.0)
    smallest: int = 2
    largest: int = 128

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that are not allowed."""
        _at_least("smallest", self.smallest, 1)
        _at_least("largest", self.largest, self.smallest)

    @abstractmethod
    def gain(self, rollouts: int, chance: float) -> float:
        """Return what one more than `rollouts` is worth at a success probability."""

    def first(self, prior: Tensor) -> Tensor:
        """Return the budget of every prompt, adding up to the step's."""
        low, high = self.reward_range
        chances = ((prior.double() - low) / (high - low)).clamp(1e-6, 1 - 1e-6).tolist()
        total = round(self.mean_rollouts * len(chances))
        return greedy(
            len(chances), total, self.smallest, self.largest, lambda group, size: self.gain(size, chances[group])
        )

    def more(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Ask:
        """Return that nobody wants more."""
        return _nothing(prior)


class Utility(Allocation):
    """V0's own budget: greedy by `U(B, p) = B (1-p) (1 - (1-p)^(B-1))` (arXiv 2602.03584)."""

    def gain(self, rollouts: int, chance: float) -> float:
        """Return the utility that one more adds."""
        return utility(rollouts + 1, chance) - utility(rollouts, chance)


class Variance(Allocation):
    """Least total variance of the groups' means under the prior, as VIP allocates (arXiv 2602.01601).

    With `p` the prior's success probability, the variance of a mean of B rewards is `p (1 - p) / B`; each rollout goes
    where it lowers the sum most, which is the integer optimum.
    """

    def gain(self, rollouts: int, chance: float) -> float:
        """Return the variance that one more takes away."""
        return chance * (1 - chance) / (rollouts * (rollouts + 1))


@dataclass
class ReinforceAda(_Forgetful):
    """Rounds of rollouts until a group holds the outcomes it needs (Reinforce-Ada, arXiv 2510.04996, sequential).

    What its authors do to the rollouts afterwards, thinning groups to one size and taking statistics over all rounds,
    is a matter of the advantage and not done here.

    Attributes:
        round: rollouts of a round.
        largest: rollouts of a prompt at most.
        reward_range: smallest and largest reward; a reward in its upper half is a success.
        each: how many of either outcome end it: 1, or half a group for the paper's balanced variant.
        positive: the paper's positive variant: `each` successes end it, whatever failures there are.
    """

    round: int = 4
    largest: int = 16
    reward_range: tuple[float, float] = (-1.0, 1.0)
    each: int = 1
    positive: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that are not allowed."""
        _at_least("round", self.round, 1)
        _at_least("largest", self.largest, self.round)
        _at_least("each", self.each, 1)

    def first(self, prior: Tensor) -> Tensor:
        """Return one round for every prompt."""
        return torch.full((len(prior),), self.round)

    def more(self, rewards: Tensor, offsets: Tensor, prior: Tensor) -> Ask:
        """Return another round for the groups that lack an outcome."""
        counts = offsets.diff()
        group = torch.repeat_interleave(torch.arange(len(counts)), counts)
        solved = torch.zeros(len(counts)).index_add_(0, group, (rewards > sum(self.reward_range) / 2).float())
        rarer = solved if self.positive else torch.minimum(solved, counts - solved)
        lacking = (self.each - rarer).clamp(min=0)
        more = torch.minimum(torch.full_like(counts, self.round), (self.largest - counts).clamp(min=0))
        return Ask(torch.where(lacking > 0, more, 0), lacking / counts.clamp(min=1))


def utility(rollouts: int, chance: float) -> float:
    """Return V0's utility of a number of rollouts at a success probability."""
    failure = 1 - chance
    return rollouts * failure * (1 - failure ** (rollouts - 1))


def greedy(groups: int, total: int, smallest: int, largest: int, gain: Callable[[int, int], float]) -> Tensor:
    """Return `total` divided among groups, each next unit going where it gains most; ties to the first.

    Args:
        groups: how many.
        total: to divide; what `smallest` needs is given even where that is more, `largest` is never passed.
        smallest: of a group.
        largest: of a group.
        gain: of one more for a group (its number) that has so many; the sum is the largest possible where it never
            grows with how many there are.

    Returns:
        [groups] int64.
    """
    given = [smallest] * groups
    queue = [(-gain(group, smallest), group) for group in range(groups) if smallest < largest]
    heapq.heapify(queue)
    for _ in range(total - smallest * groups):
        if not queue:
            break
        _, group = heapq.heappop(queue)
        given[group] += 1
        if given[group] < largest:
            heapq.heappush(queue, (-gain(group, given[group]), group))
    return torch.tensor(given, dtype=torch.int64)


def _nothing(prior: Tensor) -> Ask:
    return Ask(torch.zeros(len(prior), dtype=torch.int64), torch.zeros(len(prior)))


def _at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"{name} is {value}; allowed: {smallest} or more")
