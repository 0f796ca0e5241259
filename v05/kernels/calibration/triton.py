"""Calibrated fusion in Triton, in three launches: likelihoods, the fit in one program, and what each group gets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.calibration.buffers import allocate
from v05.kernels.calibration.components import NEAR, PRIOR_COUNT, STEPS
from v05.kernels.calibration.rules import Outputs
from v05.kernels.calibration.triton_terms import (
    belief_of,
    kind_of,
    look_ahead,
    mean_without,
    planned_rollouts,
    relative_likelihood,
    unit_reward,
)
from v05.kernels.device import on_device_of
from v05.kernels.shrinkage.rules import Budget
from v05.kernels.shrinkage.triton import load_groups, load_tile, scalar, shifted_sum

BLOCK_GROUPS = 4
BLOCK_ROLLOUTS = 8
WARPS = 1  # tiles of groups by 8 that lie in one warp need no shared memory
BLOCK_FIT = {torch.float32: 1024, torch.float64: 512}  # groups that a step has in registers at a time
FIT_WARPS = 16
COUNTS = ["groups", "k_init", "k_max"]


@triton.jit
def unit_sums(rewards, begin, end, low, high, near, acc: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of each group's rewards in [0, 1] as two-valued and as graded, and the largest of what `kind_of` says."""
    solved = tl.zeros([BLOCK_G], acc)
    total = tl.zeros([BLOCK_G], acc)
    kind = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, tl.max(end - begin), BLOCK_K):
        _o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
        solved += tl.sum(tl.where(m_rollout, unit_reward(b_reward, low, high, True), 0).to(acc), axis=1)
        total += tl.sum(tl.where(m_rollout, unit_reward(b_reward, low, high, False), 0), axis=1)
        kind = tl.maximum(kind, tl.max(tl.where(m_rollout, kind_of(b_reward, low, high, near), 0), axis=1))
    return solved, total, kind


@triton.jit(do_not_specialize=["groups"])
def likelihood_kernel(
    rewards,
    offsets,
    prior,
    scratch,
    groups: tl.int64,
    low: tl.float64,
    high: tl.float64,
    NEAR: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Likelihoods of BLOCK_G groups under each component, as two-valued and as graded, and whether they are graded.

    The largest of a group is 1; all are 0 for a group without rewards, and for one with a reward or a prior that is not
    finite, which so counts for nothing. They lie in scratch as buffers.py says.
    """
    acc: tl.constexpr = scratch.dtype.element_ty
    o_group, m_group, begin, end, _first = load_groups(rewards, offsets, groups, acc, BLOCK_G)
    a, b, near = scalar(low, acc), scalar(high, acc), scalar((high - low) * NEAR, acc)
    solved, total, kind = unit_sums(rewards, begin, end, a, b, near, acc, BLOCK_G, BLOCK_K)
    value = tl.load(prior + o_group, mask=m_group, other=0).to(acc)
    kind = tl.where(tl.abs(value) < float("inf"), kind, 2)
    centre = (value - a) / (b - a)
    count = end - begin
    m_counted = ((count > 0) & (kind < 2))[:, None]
    most = tl.max(count)
    o_component = tl.arange(0, 8)
    m_table = m_group[:, None] & (o_component < 7)[None, :]
    o_table = o_component[None, :] * groups + o_group[:, None]
    b_likelihood = relative_likelihood(solved, count, centre, True, most, acc)
    tl.store(scratch + o_table, tl.where(m_counted, b_likelihood, 0), mask=m_table)
    b_likelihood = relative_likelihood(total, count, centre, False, most, acc)
    tl.store(scratch + 7 * groups + o_table, tl.where(m_counted, b_likelihood, 0), mask=m_table)
    tl.store(scratch + 14 * groups + o_group, (kind == 1).to(acc), mask=m_group)


@triton.jit(do_not_specialize=["groups"])
def fit_kernel(
    scratch,
    state,
    new_state,
    graded,
    groups: tl.int64,
    decay: tl.float64,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Whether any group is graded, and expectation maximisation over all, in one program and a fixed order."""
    acc: tl.constexpr = scratch.dtype.element_ty
    b_between = tl.zeros([BLOCK_F], acc)
    for start in range(0, groups, BLOCK_F):
        o_group = start + tl.arange(0, BLOCK_F)
        b_between += tl.load(scratch + 14 * groups + o_group, mask=o_group < groups, other=0)
    any_graded = tl.max(b_between, axis=0) > 0
    tl.store(graded, any_graded)
    table = scratch + any_graded.to(tl.int64) * 7 * groups
    o_component = tl.arange(0, 8)
    m_component = o_component < 7
    b_state = tl.zeros([8], acc)
    if state is not None:
        b_state = tl.load(state + o_component, mask=m_component, other=0).to(acc) * scalar(decay, acc)
    b_start = tl.where(m_component, b_state + COUNT, 0)
    b_weight = b_start / tl.sum(b_start, axis=0)
    b_soft = tl.zeros([8], acc)
    for _step in range(0, STEPS):
        b_share = tl.zeros([BLOCK_F, 8], acc)
        for start in range(0, groups, BLOCK_F):
            o_group = start + tl.arange(0, BLOCK_F)
            m_table = (o_group < groups)[:, None] & m_component[None, :]
            b_joint = tl.load(table + o_component[None, :] * groups + o_group[:, None], mask=m_table, other=0)
            b_joint *= b_weight[None, :]
            b_total = tl.sum(b_joint, axis=1)
            b_share += b_joint / tl.where(b_total > 0, b_total, 1)[:, None]
        b_soft = tl.sum(b_share, axis=0)
        b_weight = (b_soft + b_start) / tl.sum(b_soft + b_start, axis=0)
    tl.store(scratch + 15 * groups + o_component, b_weight, mask=m_component)
    tl.store(new_state + o_component, b_soft + b_state, mask=m_component)


@triton.jit(do_not_specialize=COUNTS)
def calibrated_kernel(
    rewards,
    offsets,
    prior,
    scratch,
    floats,
    integers,
    more,
    rollout_baseline,
    advantages,
    graded,
    groups: tl.int64,
    low: tl.float64,
    high: tl.float64,
    cost: tl.float64,
    k_init: tl.int64,
    k_max: tl.int64,
    LEAVE_ONE_OUT: tl.constexpr,
    ADVANTAGES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Belief, gain and plan of BLOCK_G groups, and the baselines of their rollouts."""
    acc: tl.constexpr = floats.dtype.element_ty
    two = tl.load(graded) == 0
    o_group, m_group, begin, end, first = load_groups(rewards, offsets, groups, acc, BLOCK_G)
    a, b = scalar(low, acc), scalar(high, acc)
    value = tl.load(prior + o_group, mask=m_group, other=0).to(acc)
    centre = (value - a) / (b - a)
    solved, total, kind = unit_sums(rewards, begin, end, a, b, 0, acc, BLOCK_G, BLOCK_K)
    finite = (kind < 2) & (tl.abs(value) < float("inf"))
    total = tl.where(two, solved, total)
    count = end - begin
    k = count.to(acc)
    width = b - a
    o_component = tl.arange(0, 8)
    m_component = o_component < 7
    m_table = m_group[:, None] & m_component[None, :]
    o_table = o_component[None, :] * groups + o_group[:, None]
    o_weight = 15 * groups + o_component[None, :] + 0 * o_group[:, None]
    b_weight = tl.load(scratch + o_weight, mask=m_component[None, :], other=0)
    b_share = tl.load(scratch + tl.where(two, 0, 7) * groups + o_table, mask=m_table, other=1)
    b_share = tl.where((count[:, None] > 0) | ~finite[:, None], b_share, 1)  # of 0 alone, all that follows is NaN
    p, variance, trust = belief_of(b_share, b_weight, total, k, centre, two)
    strength, scale = look_ahead(p, variance, two)
    planned = planned_rollouts(strength, scale, count, scalar(cost, acc), k_init, k_max)
    mean = shifted_sum(rewards, begin, end, first, acc, BLOCK_G, BLOCK_K)
    mean = tl.where(finite, tl.where(count > 0, first + mean / tl.maximum(k, 1), value), p)
    gap = mean - value
    deviation = tl.maximum(gap * gap - width * width * 0.25 / tl.maximum(k, 1), 0)
    deviation = tl.where(finite, tl.where(count > 0, deviation, 0), p)
    baseline = a + width * p
    tl.store(floats + o_group, mean, mask=m_group)
    tl.store(floats + groups + o_group, deviation, mask=m_group)
    tl.store(floats + 2 * groups + o_group, trust, mask=m_group)
    tl.store(floats + 3 * groups + o_group, baseline, mask=m_group)
    tl.store(floats + 4 * groups + o_group, width * width * variance, mask=m_group)
    tl.store(floats + 5 * groups + o_group, width * width * scale / (strength * (strength + 1)), mask=m_group)
    tl.store(integers + o_group, count, mask=m_group)
    tl.store(integers + groups + o_group, planned, mask=m_group)
    tl.store(more + o_group, planned > count, mask=m_group)
    if LEAVE_ONE_OUT or ADVANTAGES:
        most = tl.max(count)
        others = tl.maximum(count - 1, 0)
        mu_failed = baseline
        mu_solved = baseline
        if LEAVE_ONE_OUT and two:  # only two rewards can be left out
            mu_failed = a + width * mean_without(tl.minimum(total, others), others, centre, b_weight, two, most, acc)
            mu_solved = a + width * mean_without(tl.maximum(total - 1, 0), others, centre, b_weight, two, most, acc)
        for i in range(0, most):
            m_rollout = i < count
            reward = tl.load(rewards + begin + i, mask=m_rollout, other=0).to(acc)
            mu = baseline
            if LEAVE_ONE_OUT:
                z = unit_reward(reward, a, b, two)
                mu = tl.where(z > 0.5, mu_solved, mu_failed)
                if two == 0:
                    mu = a + width * mean_without(total - z, others, centre, b_weight, two, most, acc)
                mu = tl.where(finite, mu, baseline)
                tl.store(rollout_baseline + begin + i, mu, mask=m_rollout)
            if ADVANTAGES:
                tl.store(advantages + begin + i, reward - mu, mask=m_rollout)


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
    """Same contract as the reference, but rewards may be of any of `segments.DTYPES`; three launches and nothing else
    on the device, no synchronisation."""
    rewards, offsets, prior = rewards.contiguous(), offsets.contiguous(), prior.contiguous()
    state = None if state is None else state.contiguous()
    groups = prior.numel()
    out = allocate(rewards.numel(), prior, offsets, leave_one_out, advantages)
    tiles = {"BLOCK_G": BLOCK_GROUPS, "BLOCK_K": BLOCK_ROLLOUTS, "num_warps": WARPS}
    grid = (triton.cdiv(groups, BLOCK_GROUPS),)
    given = (rewards, offsets, prior, out.scratch)
    with on_device_of(rewards):
        if groups:
            likelihood_kernel[grid](*given, groups, budget.low, budget.high, NEAR=NEAR, **tiles)
        fit_kernel[(1,)](
            *(out.scratch, state, out.state, out.graded, groups, state_decay),
            COUNT=PRIOR_COUNT,
            STEPS=STEPS,
            BLOCK_F=BLOCK_FIT[prior.dtype],
            num_warps=FIT_WARPS,
        )
        if groups:
            calibrated_kernel[grid](
                *(*given, out.floats, out.integers, out.more, out.rollout_baseline, out.advantages, out.graded),
                groups,
                *budget,
                LEAVE_ONE_OUT=leave_one_out,
                ADVANTAGES=advantages,
                **tiles,
            )
    return out.outputs
