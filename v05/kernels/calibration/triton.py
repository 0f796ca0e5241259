"""Calibrated fusion in Triton: likelihoods, the fit in one program, and what each group gets; three launches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.calibration.components import PRIOR_COUNT, STEPS
from v05.kernels.calibration.native import allocate
from v05.kernels.calibration.rules import Outputs
from v05.kernels.calibration.triton_terms import (
    belief_of,
    look_ahead,
    mean_without,
    relative_likelihood,
    unit_reward,
)
from v05.kernels.device import on_device_of
from v05.kernels.shrinkage.rules import Budget
from v05.kernels.shrinkage.triton import load_groups, load_tile, scalar, shifted_sum

BLOCK_GROUPS = 16
WARPS = 2
BLOCK_ROLLOUTS = 16
BLOCK_FIT = 512
FIT_WARPS = 16
COUNTS = ["groups", "k_init", "k_max"]


@triton.jit
def unit_groups(
    rewards,
    prior,
    o_group,
    m_group,
    begin,
    end,
    low,
    high,
    two,
    acc: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum of each group's rewards and its prior, both in [0, 1]."""
    total = tl.zeros([BLOCK_G], acc)
    for start in range(0, tl.max(end - begin), BLOCK_K):
        _o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
        total += tl.sum(tl.where(m_rollout, unit_reward(b_reward, low, high, two), 0), axis=1)
    value = tl.load(prior + o_group, mask=m_group, other=0).to(acc)
    return total, value, (value - low) / (high - low)


@triton.jit(do_not_specialize=["groups"])
def likelihood_kernel(
    rewards,
    offsets,
    prior,
    graded,
    table,
    groups: tl.int64,
    low: tl.float64,
    high: tl.float64,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The likelihood of BLOCK_G groups under each component, the largest 1; 0 for a group without rewards."""
    acc: tl.constexpr = table.dtype.element_ty
    two = tl.load(graded) == 0
    o_group, m_group, begin, end, _first = load_groups(rewards, offsets, groups, acc, BLOCK_G)
    bounds_low, bounds_high = scalar(low, acc), scalar(high, acc)
    total, _value, centre = unit_groups(
        rewards, prior, o_group, m_group, begin, end, bounds_low, bounds_high, two, acc, BLOCK_G, BLOCK_K
    )
    count = end - begin
    b_likelihood = relative_likelihood(total, count, centre, two, tl.max(count), acc)
    b_likelihood = tl.where(count[:, None] > 0, b_likelihood, 0)
    o_component = tl.arange(0, 8)
    m_table = m_group[:, None] & (o_component < 7)[None, :]
    tl.store(table + o_component[None, :] * groups + o_group[:, None], b_likelihood, mask=m_table)


@triton.jit(do_not_specialize=["groups"])
def fit_kernel(
    table, state, weights, new_state, groups: tl.int64, COUNT: tl.constexpr, STEPS: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Expectation maximisation over all groups in one program, in a fixed order."""
    acc: tl.constexpr = table.dtype.element_ty
    o_component = tl.arange(0, 8)
    m_component = o_component < 7
    b_state = tl.load(state + o_component, mask=m_component, other=0).to(acc)
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
    tl.store(weights + o_component, b_weight, mask=m_component)
    tl.store(new_state + o_component, b_soft + b_state, mask=m_component)


@triton.jit(do_not_specialize=COUNTS)
def calibrated_kernel(
    rewards,
    offsets,
    prior,
    graded,
    table,
    weights,
    floats,
    integers,
    more,
    rollout_baseline,
    advantages,
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
    total, value, centre = unit_groups(rewards, prior, o_group, m_group, begin, end, a, b, two, acc, BLOCK_G, BLOCK_K)
    count = end - begin
    k = count.to(acc)
    width = b - a
    o_component = tl.arange(0, 8)
    m_component = o_component < 7
    b_weight = tl.load(weights + o_component, mask=m_component, other=0)
    m_table = m_group[:, None] & m_component[None, :]
    b_share = tl.load(table + o_component[None, :] * groups + o_group[:, None], mask=m_table, other=1)
    b_share = tl.where(count[:, None] > 0, b_share, 1)
    p, variance, trust = belief_of(b_share, b_weight, total, k, centre, two)
    strength, scale = look_ahead(p, variance, two)
    planned = tl.maximum(count, k_init)
    for _step in range(0, k_max - k_init):
        u = strength + (planned - count).to(acc)
        worth = 4 * scale > scalar(cost, acc) * u * (u + 1)
        planned += ((count >= k_init) & (planned < k_max) & worth).to(tl.int64)
    mean = shifted_sum(rewards, begin, end, first, acc, BLOCK_G, BLOCK_K)
    mean = tl.where(count > 0, first + mean / tl.maximum(k, 1), value)
    gap = mean - value
    deviation = tl.maximum(gap * gap - width * width * 0.25 / tl.maximum(k, 1), 0)
    baseline = a + width * p
    tl.store(floats + o_group, mean, mask=m_group)
    tl.store(floats + groups + o_group, tl.where(count > 0, deviation, 0), mask=m_group)
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
        failed = baseline
        solved = baseline
        if LEAVE_ONE_OUT and two:  # only two rewards can be left out
            failed = a + width * mean_without(tl.minimum(total, others), others, centre, b_weight, two, most, acc)
            solved = a + width * mean_without(tl.maximum(total - 1, 0), others, centre, b_weight, two, most, acc)
        for i in range(0, most):
            m_rollout = i < count
            reward = tl.load(rewards + begin + i, mask=m_rollout, other=0).to(acc)
            mu = baseline
            if LEAVE_ONE_OUT:
                z = unit_reward(reward, a, b, two)
                mu = tl.where(z > 0.5, solved, failed)
                if two == 0:
                    mu = a + width * mean_without(total - z, others, centre, b_weight, two, most, acc)
                tl.store(rollout_baseline + begin + i, mu, mask=m_rollout)
            if ADVANTAGES:
                tl.store(advantages + begin + i, reward - mu, mask=m_rollout)


def calibrated(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    graded: Tensor,
    state: Tensor,
    budget: Budget,
    leave_one_out: bool,
    advantages: bool,
) -> Outputs:
    """Same contract as the reference; three launches, no synchronisation."""
    rewards, offsets, prior, state = (tensor.contiguous() for tensor in (rewards, offsets, prior, state))
    groups = prior.numel()
    out = allocate(rewards, offsets, leave_one_out, advantages)
    table, weights, *written, new_state = out
    blocks = {"BLOCK_G": BLOCK_GROUPS, "BLOCK_K": BLOCK_ROLLOUTS}
    grid = (triton.cdiv(groups, BLOCK_GROUPS),)
    with on_device_of(rewards):
        if groups:
            likelihood_kernel[grid](rewards, offsets, prior, graded, table, groups, budget.low, budget.high, **blocks)
        fit_kernel[(1,)](
            *(table, state, weights, new_state, groups),
            COUNT=PRIOR_COUNT,
            STEPS=STEPS,
            BLOCK_F=BLOCK_FIT,
            num_warps=FIT_WARPS,
        )
        if groups:
            calibrated_kernel[grid](
                *(rewards, offsets, prior, graded, table, weights, *written, groups),
                *budget,
                LEAVE_ONE_OUT=leave_one_out,
                ADVANTAGES=advantages,
                num_warps=WARPS,
                **blocks,
            )
    return out.outputs
