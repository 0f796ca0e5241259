"""The mathematics of calibrated fusion in Triton, on tiles of groups by components, as in csrc/calibration.h."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.shrinkage.triton import PLAN_SLACK, first_guess, root, scalar


@triton.jit
def unit_reward(reward, low, high, two):
    """A reward in [0, 1]; of two values, exactly 0 or 1."""
    z = (reward - low) / (high - low)
    return tl.where(two, tl.where(z > 0.5, 1.0, 0.0), z)


@triton.jit
def kind_of(reward, low, high, near):
    """1 for a reward that is neither the smallest nor the largest possible, 2 for one that is not finite, else 0."""
    between = (tl.abs(reward - low) > near) & (tl.abs(high - reward) > near)
    return tl.where(tl.abs(reward) < float("inf"), between.to(tl.int32), 2)


@triton.jit
def components(centre, acc: tl.constexpr):
    """Strength `[1, 8]` and centre `[G, 8]` of every component; the eighth is none, and repeats the seventh."""
    o = tl.arange(0, 8)[None, :]
    strength = tl.where(o == 0, scalar(0.3, acc), tl.where(o == 2, 3.0, tl.where(o == 3, 10.0, 1.0)))
    strength = tl.where(o == 4, 30.0, tl.where(o == 5, 100.0, strength))
    inside = tl.minimum(tl.maximum(centre, scalar(0.02, acc)), scalar(0.98, acc))
    return strength.to(acc), tl.where(o < 6, inside[:, None], 0.5).to(acc)


@triton.jit
def relative_likelihood(total, count, centre, two, most, acc: tl.constexpr):
    """Likelihoods `[G, 8]` of groups of at most `most` rewards with these sums, the largest of a group 1."""
    h, c = components(centre, acc)
    k = count[:, None]
    b_log = tl.zeros_like(c)
    if two:
        successes = (total + 0.5).to(tl.int64)[:, None]
        for start in range(0, most, 4):  # a logarithm for four ratios, whose products do not overflow
            above = tl.full(c.shape, 1, acc)
            below = tl.full(c.shape, 1, acc)
            for j in tl.static_range(4):
                i = start + j
                factor = tl.where(i < successes, h * c + i, h * (1 - c) + (i - successes).to(acc))
                above *= tl.where(i < k, factor, 1)
                below *= tl.where(i < k, h + i, 1)
            b_log += tl.log(above / below)
    else:
        n = tl.maximum(k, 1).to(acc)
        gap = total[:, None] / n - c
        variance = (n + 1 + h) / (4 * n * (1 + h))
        b_log = tl.where(k > 0, (tl.log(variance) + gap * gap / variance) * -0.5, 0)
    return tl.exp(b_log - tl.max(b_log, axis=1)[:, None])


@triton.jit
def belief_of(b_likelihood, b_weight, total, k, centre, two):
    """Mean and variance of the expected reward in [0, 1] and the trust in the group's own rewards, `[G]` each.

    Likelihoods and weights are tiles `[G, 8]`.
    """
    h, c = components(centre, b_likelihood.dtype)
    b_share = b_likelihood * b_weight
    b_share = b_share / tl.sum(b_share, axis=1)[:, None]
    b_strength = k[:, None] + h + tl.where(two, 0.0, 1.0)
    b_mean = (total[:, None] + (b_strength - k[:, None]) * c) / b_strength
    mean = tl.sum(b_share * b_mean, axis=1)
    b_gap = b_mean - mean[:, None]
    b_own = tl.where(two, b_mean * (1 - b_mean), 0.25) / (k[:, None] + h + 1)
    return mean, tl.sum(b_share * (b_own + b_gap * b_gap), axis=1), tl.sum(b_share * k[:, None] / b_strength, axis=1)


@triton.jit
def look_ahead(mean, variance, two):
    """Strength u of a belief and e: j more rollouts bring the gain of one more to e / ((u + j) (u + j + 1))."""
    strength = tl.where(two, mean * (1 - mean) / variance - 1, 0.25 / variance)
    return strength, tl.where(two, variance * strength, 0.25)


@triton.jit
def worth_one_more(strength, scale, cost):
    """4 e / (u (u + 1)) > cost: what one more rollout takes off the variance, in units of the largest there is."""
    return 4 * scale > cost * strength * (strength + 1)


@triton.jit
def planned_rollouts(strength, scale, count, cost, k_init, k_max):
    """The fewest rollouts, from count up, at which one more gains no more than it costs; below k_init, k_init."""
    about = root(4 * scale / cost) - strength + count.to(strength.dtype)
    planned = tl.where(worth_one_more(strength, scale, cost), first_guess(about, count, k_max), count)
    for _step in range(0, 2 * PLAN_SLACK):
        worth = worth_one_more(strength + (planned - count).to(strength.dtype), scale, cost)
        planned += ((planned < k_max) & worth).to(tl.int64)
    return tl.where(count < k_init, k_init, planned)


@triton.jit
def mean_without(total, others, centre, b_weight, two, most, acc: tl.constexpr):
    """Mean of the belief from `others` rewards with this sum, in [0, 1]."""
    total = total.to(acc)
    b_likelihood = relative_likelihood(total, others, centre, two, most, acc)
    mean, _variance, _trust = belief_of(b_likelihood, b_weight, total, others.to(acc), centre, two)
    return mean
