"""The rule that gives out rollouts: reward range, cost and bounds, with their checks."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from v05.kernels import segments

Some = TypeVar("Some", Tensor, Tensor | None)
SLACK = 1e-6  # of the reward range: how far rounding may push a reward or a prior outside it
NARROWEST, WIDEST = 1e-15, 1e15  # a reward range, whose square float32 has to hold
LARGEST = 2**31 - 1  # k_max: the square of far larger counts, which the test needs, is infinite in float32
PLAN_SLACK = 2  # rollouts: how far rounding may push a plan


# floats [6, G], integers [2, G], roll_out_more [G], rollout_baseline [N or 0], advantages [N or 0]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Budget(NamedTuple):
    """The range of a reward, the cost of a rollout in units of the largest variance, and the bounds of a group."""

    low: float
    high: float
    cost: float
    k_init: int
    k_max: int

    @property
    def variance(self) -> float:
        """s = ((b - a) / 2)^2, the largest variance of a reward in [a, b]."""
        return ((self.high - self.low) / 2) ** 2


def make_budget(reward_range: tuple[float, float], cost: float, k_init: int, k_max: int) -> Budget:
    """Builds a checked `Budget`.

    Raises:
        ValueError: an empty or infinite range, or one whose variance float32 does not hold; a negative cost, or not
            1 <= k_init <= k_max <= `LARGEST`.
    """
    low, high = float(reward_range[0]), float(reward_range[1])
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"reward_range is ({low}, {high}); allowed: two finite numbers, the first below the second")
    if not NARROWEST <= high - low <= WIDEST:
        raise ValueError(f"reward_range is ({low}, {high}); allowed: ends that are {NARROWEST:g} to {WIDEST:g} apart")
    if not 0 <= cost < math.inf:
        raise ValueError(f"cost is {cost}; allowed: a finite number, 0 or above")
    if not 1 <= k_init <= k_max:
        raise ValueError(f"k_init is {k_init} and k_max {k_max}; allowed: 1 <= k_init <= k_max")
    if k_max > LARGEST:
        raise ValueError(f"k_max is {k_max}; allowed: {LARGEST} or less")
    return Budget(low, high, float(cost), int(k_init), int(k_max))


def _rounded(value: float, dtype: torch.dtype) -> float:
    """The value as a dtype holds it; itself where that would be infinite."""
    info = torch.finfo(dtype)
    spacing = info.eps * max(math.ldexp(1.0, math.frexp(value)[1] - 1), info.smallest_normal)
    nearest = round(value / spacing) * spacing
    return nearest if abs(nearest) <= info.max else value


def in_dtype(budget: Budget, dtype: torch.dtype) -> Budget:
    """The budget with the ends of its range as rewards of a half dtype hold them, so that one at an end is there.

    Raises:
        ValueError: in that dtype both ends are the same.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return budget
    low, high = _rounded(budget.low, dtype), _rounded(budget.high, dtype)
    if low == high:
        given = f"({budget.low}, {budget.high})"
        raise ValueError(f"reward_range is {given}, in {dtype} ({low}, {high}); allowed: ends that differ there too")
    return budget._replace(low=low, high=high)


def check_group_shapes(rewards: Tensor, offsets: Tensor, prior: Tensor | None) -> None:
    """Raises where rewards `[N]`, offsets `[G+1]` and prior `[G]` do not fit together; values are not read."""
    segments.check_vector("rewards", rewards)
    segments.check_offsets("offsets", offsets, rewards)
    if prior is not None:
        segments.check_vector("prior", prior, rewards, offsets.numel() - 1)


def _within(prior: Tensor, given: Budget, budget: Budget) -> Tensor:
    """The prior moved to an end of the budget's range where that was rounded across it; others stay as they are."""
    if budget == given:
        return prior
    slack = SLACK * (given.high - given.low)
    allowed = (prior >= given.low - slack) & (prior <= given.high + slack)
    return torch.where(allowed, prior.clamp(budget.low, budget.high), prior)


def prepared(rewards: Tensor, offsets: Tensor, prior: Some, given: Budget) -> tuple[Tensor, Some, Budget]:
    """The rewards in their own dtype, the prior in the working dtype, both without gradient, and the budget by which
    they count: a half dtype rounds the ends of the range.

    Raises:
        ValueError, TypeError: they do not fit together, or the range has one end in that dtype. Values are not read.
    """
    check_group_shapes(rewards, offsets, prior)
    budget = in_dtype(given, rewards.dtype)
    if prior is not None:
        prior = _within(segments.constant(prior, segments.working_dtype(rewards)), given, budget)
    return segments.constant(rewards, rewards.dtype), prior, budget


def check_group_values(rewards: Tensor, offsets: Tensor, prior: Tensor | None, low: float, high: float) -> None:
    """Raises at the first offset, reward or prior that is not allowed; waits for the device."""
    slack = SLACK * (high - low)
    segments.check_offset_values("offsets", offsets, rewards.numel())
    segments.check_range("rewards", rewards, low, high, offsets, slack)
    if prior is not None:
        segments.check_range("prior", prior, low, high, slack=slack)


def readable(rewards: Tensor, backend: str) -> Tensor:
    """The rewards in a dtype that the backend reads: half precision on a GPU as it is, else the working dtype."""
    as_it_is = backend in ("cuda", "triton") and rewards.dtype in segments.DTYPES
    return rewards if as_it_is else rewards.to(segments.working_dtype(rewards))


def group_sums(rewards: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First reward `[G]`, shifted sum of (r - first) `[G]`, group of each reward `[N]` and count `[G]`.

    Shifting by the first reward makes the mean of equal rewards exact, so that their advantages are exactly 0.
    """
    count = segments.lengths(offsets)
    ids = segments.segment_ids(offsets, rewards.numel())
    padded = torch.cat([rewards, rewards.new_zeros(1)])
    first = torch.where(count > 0, padded[offsets[:-1]], 0)
    return first, segments.segment_sum(rewards - first[ids], ids, count.numel()), ids, count
