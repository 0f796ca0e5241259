"""Calibrated fusion in plain torch, the oracle: nonparametric empirical Bayes over a batch of groups (ours).

Rewards are z = (r - a) / (b - a) in [0, 1]. A group has k of them with sum x, and a prior centred at
c = (V - a) / (b - a). Two-valued rewards: p ~ Beta(h c, h (1 - c)) for each strength h, x ~ Binomial(k, p). Graded
rewards: the mean is N(c, 1 / (4 (1 + h))), each reward N(mean, 1/4), the largest variance it can have. The last
component has h = 1 and c = 1/2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.calibration.components import COMPONENTS, EDGE, IGNORING, NEAR, PRIOR_COUNT, STEPS, STRENGTHS
from v05.kernels.calibration.rules import Outputs
from v05.kernels.shrinkage.reference import planned_rollouts, root, squared_deviation
from v05.kernels.shrinkage.rules import Budget, group_sums


class Posterior(NamedTuple):
    """Mean and variance of a group's expected reward in [0, 1], and the trust in its own rollouts, `[G]` each."""

    mean: Tensor
    variance: Tensor
    weight: Tensor


def is_graded(rewards: Tensor, budget: Budget) -> Tensor:
    """Whether each reward is neither the smallest nor the largest possible; NaN is not."""
    near = NEAR * (budget.high - budget.low)
    return ((rewards - budget.low).abs() > near) & ((budget.high - rewards).abs() > near)


def components(centre: Tensor) -> tuple[Tensor, Tensor]:
    """Strength `[C]` and centre `[G, C]` of every component."""
    strength = torch.tensor([*STRENGTHS, IGNORING], dtype=centre.dtype, device=centre.device)
    middle = torch.full_like(centre, 0.5)
    return strength, torch.stack([centre.clamp(EDGE, 1 - EDGE)] * len(STRENGTHS) + [middle], dim=1)


def log_likelihood(x: Tensor, k: Tensor, centre: Tensor, graded: Tensor) -> Tensor:
    """log L `[G, C]` of a sum x `[G]` of k rewards under each component, up to a constant of the group."""
    h, c = components(centre)
    x, k = x[:, None], k[:, None]
    a, b = h * c, h * (1 - c)
    beta = torch.lgamma(x + a) + torch.lgamma(k - x + b) - torch.lgamma(k + h)
    beta = beta - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(h))
    some = k.clamp(min=1)
    variance = (some + 1 + h) / (4 * some * (1 + h))
    normal = -(variance.log() + (x / some - c).square() / variance) / 2
    return torch.where(k > 0, torch.where(graded, normal, beta), 0)


def posterior(x: Tensor, k: Tensor, centre: Tensor, graded: Tensor, weights: Tensor) -> Posterior:
    """What a group's rewards and its prior say under the mixture weights `[C]`."""
    h, c = components(centre)
    share = torch.softmax(log_likelihood(x, k, centre, graded) + weights.log(), dim=1)
    x, k = x[:, None], k[:, None]
    strength = torch.where(graded, h + 1, h)
    mean = (x + strength * c) / (k + strength)
    own = torch.where(graded, 1 / (4 * (k + strength)), mean * (1 - mean) / (k + strength + 1))
    overall = (share * mean).sum(1)
    variance = (share * (own + (mean - overall[:, None]).square())).sum(1)
    return Posterior(overall, variance, (share * k / (k + strength)).sum(1))


def fit(likelihood: Tensor, counted: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Mixture weights `[C]` by expectation maximisation, and the expected groups `[C]` of each component.

    Args:
        likelihood: log L `[G, C]`.
        counted: `[G]` bool, groups that have a reward, and finite values alone.
        state: `[C]`, groups of earlier batches, already decayed.
    """
    start = state + PRIOR_COUNT
    weights, soft = start / start.sum(), torch.zeros_like(start)
    for _ in range(STEPS):
        share = torch.softmax(likelihood + weights.log(), dim=1)
        soft = torch.where(counted[:, None], share, 0).sum(0)
        weights = (soft + start) / (soft + start).sum()
    return weights, soft


def look_ahead(belief: Posterior, graded: Tensor) -> tuple[Tensor, Tensor]:
    """u and e such that j more rollouts bring the gain of one more to e / ((u + j) (u + j + 1)), in units of z^2.

    Of a Beta posterior u is its strength. With two values the gain is Var(E[p | next]) = v^2 / (p (1 - p)) exactly,
    whatever the mixture.
    """
    spread = belief.mean * (1 - belief.mean)
    strength = torch.where(graded, 0.25 / belief.variance, spread / belief.variance - 1)
    return strength, torch.where(graded, 0.25, belief.variance * strength)


def calibrated(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    state: Tensor | None,
    state_decay: float,
    budget: Budget,
    leave_one_out: bool,
    advantages: bool,
) -> Outputs:
    """The statistics of every group as those of `shrinkage.reference`, the groups `[C]` of each component, and graded.

    Rewards, prior and state are in the working dtype; a state `[C]` of earlier batches counts `state_decay` times. A
    group whose prior or one of whose rewards is not finite counts for nothing in the fit, and its statistics are NaN.
    """
    low, width = budget.low, budget.high - budget.low
    first, shifted, ids, count = group_sums(rewards, offsets)
    k = count.to(rewards.dtype)
    mean = torch.where(count > 0, first + shifted / k.clamp(min=1), prior)
    finite = prior.isfinite() & (segments.segment_sum((~rewards.isfinite()).to(k.dtype), ids, count.numel()) == 0)
    z, centre = (rewards - low) / width, torch.where(finite, (prior - low) / width, torch.nan)
    graded = (is_graded(rewards, budget) & finite[ids]).any()
    old = rewards.new_zeros(COMPONENTS) if state is None else state * state_decay
    z = torch.where(graded, z, z.round())
    x = segments.segment_sum(z, ids, count.numel())
    weights, soft = fit(log_likelihood(x, k, centre, graded), finite & (count > 0), old)
    belief = posterior(x, k, centre, graded, weights)
    strength, scale = look_ahead(belief, graded)

    def worth(planned: Tensor) -> Tensor:
        u = strength + (planned - count)
        return 4 * scale > budget.cost * u * (u + 1)

    planned = planned_rollouts(root(4 * scale / budget.cost) - strength + k, worth, count, budget)
    rollout_baseline = rewards.new_empty(0)
    if leave_one_out:
        rest = posterior(x[ids] - z, k[ids] - 1, centre[ids], graded, weights)
        rollout_baseline = low + width * rest.mean
    baseline = low + width * belief.mean
    deviation = torch.where(count > 0, squared_deviation(mean, k.clamp(min=1), prior, budget.variance), 0)
    gain = width**2 * scale / (strength * (strength + 1))
    advantage = rewards - (rollout_baseline if leave_one_out else baseline[ids]) if advantages else rewards.new_empty(0)
    floats = torch.stack([mean, deviation, belief.weight, baseline, width**2 * belief.variance, gain])
    floats = torch.where(finite, floats, torch.nan)
    return floats, torch.stack([count, planned]), planned > count, rollout_baseline, advantage, soft + old, graded
