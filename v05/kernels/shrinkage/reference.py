"""Shrinkage in plain torch: the equations of V0.5 (arXiv 2603.10848, sections 3 and 4), the oracle of every kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v05.kernels.shrinkage.rules import PLAN_SLACK, Budget, Outputs, group_sums


def squared_deviation(mean: Tensor, k: Tensor, prior: Tensor, s: float) -> Tensor:
    """d = max(0, (m - V)^2 - s / k)."""
    return ((mean - prior).square() - s / k).clamp(min=0)


def lookahead_gain(q: Tensor, k: Tensor) -> Tensor:
    """G(k) / s = q^2 / ((k q + 1) ((k + 1) q + 1)), with q = d / s held: s^2 itself may be beyond float32."""
    return q.square() / ((k * q + 1) * ((k + 1) * q + 1))


def fuse(mean: Tensor, k: Tensor, prior: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """d, w = d / (d + s / k) and mu = w m + (1 - w) V; where k is 0, d = w = 0 and mu = V."""
    some = k > 0
    k = k.clamp(min=1)
    d = torch.where(some, squared_deviation(mean, k, prior, s), 0)
    w = d / (d + s / k)
    return d, w, torch.where(some, prior + w * (mean - prior), prior)


def root(product: Tensor) -> Tensor:
    """The u above 0 of which u (u + 1) is this."""
    return ((1 + 4 * product).sqrt() - 1) / 2


def planned_rollouts(about: Tensor, worth: Callable[[Tensor], Tensor], count: Tensor, budget: Budget) -> Tensor:
    """k*: the fewest rollouts, from k up, at which one more gains no more than it costs; below k_init, k_init.

    Up to rounding that is `about`, from where `worth` decides, which says whether one more than so many pays.
    """
    inside = torch.where((about > 0) & (about < budget.k_max), about, 0).long()  # k_max may fit into no floating dtype
    guess = torch.where(about < budget.k_max, inside, budget.k_max) - PLAN_SLACK
    planned = torch.where(worth(count), torch.maximum(count, guess), count)
    for _ in range(2 * PLAN_SLACK):
        planned += ((planned < budget.k_max) & worth(planned)).long()
    return torch.where(count < budget.k_init, budget.k_init, planned)


def shrinkage(
    rewards: Tensor, offsets: Tensor, prior: Tensor, budget: Budget, leave_one_out: bool, advantages: bool
) -> Outputs:
    """The statistics of every group.

    Returns:
        floats `[6, G]` (mean, deviation, weight, baseline, mse, gain), integers `[2, G]` (count, planned),
        roll_out_more `[G]`, the leave-one-out baselines and the advantages (`[N]` each, empty where not asked for).
    """
    s = budget.variance
    first, shifted, ids, count = group_sums(rewards, offsets)
    k = count.to(rewards.dtype)
    mean = torch.where(count > 0, first + shifted / k.clamp(min=1), prior)
    d, w, baseline = fuse(mean, k, prior, s)
    q = d / s
    mse = d / (k * q + 1)
    gain = s * lookahead_gain(q, k)
    about = root(torch.ones_like(q) / budget.cost) - 1 / q
    planned = planned_rollouts(about, lambda k: lookahead_gain(q, k) > budget.cost, count, budget)
    rollout_baseline = rewards.new_empty(0)
    if leave_one_out:
        others = (k - 1)[ids]
        rest = first[ids] + (shifted[ids] - (rewards - first[ids])) / others.clamp(min=1)
        rollout_baseline = fuse(rest, others, prior[ids], s)[2]
    mu = rollout_baseline if leave_one_out else baseline[ids]
    advantage = rewards - mu if advantages else rewards.new_empty(0)
    floats = torch.stack([mean, d, w, baseline, mse, gain])
    return floats, torch.stack([count, planned]), planned > count, rollout_baseline, advantage
