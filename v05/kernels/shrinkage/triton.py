"""Shrinkage in Triton: one launch, a tile of groups a program, each group's rewards read twice at most (from cache)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.device import on_device_of
from v05.kernels.shrinkage import rules
from v05.kernels.shrinkage.rules import Budget, Outputs

BLOCK_GROUPS = 32
BLOCK_ROLLOUTS = 16
PLAN_SLACK = tl.constexpr(rules.PLAN_SLACK)


@triton.jit
def scalar(value, acc: tl.constexpr):
    """A float argument in the dtype that a kernel accumulates in."""
    return tl.full([], value, acc)


@triton.jit
def fused_baseline(mean, k, prior, s):
    """d = max(0, (m - V)^2 - s / k) and mu = V + d / (d + s / k) (m - V); V where k is 0."""
    noise = s / tl.maximum(k, 1)
    gap = tl.where(k > 0, mean - prior, 0)
    d = tl.maximum(gap * gap - noise, 0)
    return d, prior + d / (d + noise) * gap


@triton.jit
def lookahead_gain(q, k):
    """G(k) / s = q^2 / ((k q + 1) ((k + 1) q + 1)), where q = d / s: s^2 itself may be beyond float32."""
    return q * q / ((k * q + 1) * ((k + 1) * q + 1))


@triton.jit
def load_groups(rewards, offsets, groups, acc: tl.constexpr, BLOCK_G: tl.constexpr):
    """This program's groups: index, mask, begin, end and first reward."""
    o_group = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_group = o_group < groups
    begin = tl.load(offsets + o_group, mask=m_group, other=0)
    end = tl.load(offsets + o_group + 1, mask=m_group, other=0)
    first = tl.load(rewards + begin, mask=begin < end, other=0).to(acc)
    return o_group, m_group, begin, end, first


@triton.jit
def load_tile(rewards, begin, end, start, acc: tl.constexpr, BLOCK_K: tl.constexpr):
    """Addresses, mask and values of each group's rewards start to start + BLOCK_K."""
    o_rollout = begin[:, None] + start + tl.arange(0, BLOCK_K)[None, :]
    m_rollout = o_rollout < end[:, None]
    return o_rollout, m_rollout, tl.load(rewards + o_rollout, mask=m_rollout, other=0).to(acc)


@triton.jit
def shifted_sum(rewards, begin, end, first, acc: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum of (r - first) of each group."""
    total = tl.zeros([BLOCK_G], acc)
    for start in range(0, tl.max(end - begin), BLOCK_K):
        _o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
        total += tl.sum(tl.where(m_rollout, b_reward - first[:, None], 0), axis=1)
    return total


@triton.jit
def root(product):
    """The u above 0 of which u (u + 1) is this."""
    return (tl.sqrt(1 + 4 * product) - 1) * 0.5


@triton.jit
def first_guess(about, count, k_max):
    """Where a plan may begin to grow, from count to k_max, which may fit into no floating dtype."""
    below = about < k_max.to(about.dtype)
    inside = tl.where(below & (about > 0), about, 0).to(tl.int64)
    return tl.maximum(count, tl.where(below, inside, k_max) - PLAN_SLACK)


@triton.jit(do_not_specialize=["groups", "k_init", "k_max"])
def shrinkage_kernel(
    rewards,
    offsets,
    prior,
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
    """Statistics of BLOCK_G groups: fuse, test, look ahead and plan."""
    acc: tl.constexpr = floats.dtype.element_ty
    o_group, m_group, begin, end, first = load_groups(rewards, offsets, groups, acc, BLOCK_G)
    value = tl.load(prior + o_group, mask=m_group, other=0).to(acc)
    s = scalar((high - low) * (high - low) * 0.25, acc)
    price = scalar(cost, acc)
    count = end - begin
    k = count.to(acc)
    total = shifted_sum(rewards, begin, end, first, acc, BLOCK_G, BLOCK_K)
    mean = tl.where(count > 0, first + total / tl.maximum(k, 1), value)
    d, baseline = fused_baseline(mean, k, value, s)
    q = d / s
    tl.store(floats + o_group, mean, mask=m_group)
    tl.store(floats + groups + o_group, d, mask=m_group)
    tl.store(floats + 2 * groups + o_group, d / (d + s / tl.maximum(k, 1)), mask=m_group)
    tl.store(floats + 3 * groups + o_group, baseline, mask=m_group)
    tl.store(floats + 4 * groups + o_group, d / (k * q + 1), mask=m_group)
    gain = lookahead_gain(q, k)
    tl.store(floats + 5 * groups + o_group, s * gain, mask=m_group)
    planned = tl.where(gain > price, first_guess(root(1 / price) - 1 / q, count, k_max), count)
    for _step in range(0, 2 * PLAN_SLACK):
        gain = lookahead_gain(q, planned.to(acc))
        planned += ((planned < k_max) & (gain > price)).to(tl.int64)
    planned = tl.where(count < k_init, k_init, planned)
    tl.store(integers + o_group, count, mask=m_group)
    tl.store(integers + groups + o_group, planned, mask=m_group)
    tl.store(more + o_group, planned > count, mask=m_group)
    if LEAVE_ONE_OUT or ADVANTAGES:
        others = tl.maximum(k - 1, 1)[:, None]
        for start in range(0, tl.max(count), BLOCK_K):
            o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
            b_baseline = tl.broadcast_to(baseline[:, None], [BLOCK_G, BLOCK_K])
            if LEAVE_ONE_OUT:
                rest = first[:, None] + (total[:, None] - (b_reward - first[:, None])) / others
                _b_deviation, b_baseline = fused_baseline(rest, (k - 1)[:, None], value[:, None], s)
                tl.store(rollout_baseline + o_rollout, b_baseline, mask=m_rollout)
            if ADVANTAGES:
                tl.store(advantages + o_rollout, b_reward - b_baseline, mask=m_rollout)


def shrinkage(
    rewards: Tensor, offsets: Tensor, prior: Tensor, budget: Budget, leave_one_out: bool, advantages: bool
) -> Outputs:
    """Same contract as the reference; one launch, no synchronisation."""
    rewards, offsets, prior = rewards.contiguous(), offsets.contiguous(), prior.contiguous()
    groups = offsets.numel() - 1
    floats = prior.new_empty(6, groups)
    integers = offsets.new_empty(2, groups)
    more = torch.empty(groups, dtype=torch.bool, device=rewards.device)
    rollout_baseline = prior.new_empty(rewards.numel() if leave_one_out else 0)
    advantage = prior.new_empty(rewards.numel() if advantages else 0)
    if groups:
        with on_device_of(rewards):
            shrinkage_kernel[(triton.cdiv(groups, BLOCK_GROUPS),)](
                rewards,
                offsets,
                prior,
                floats,
                integers,
                more,
                rollout_baseline,
                advantage,
                groups,
                *budget,
                LEAVE_ONE_OUT=leave_one_out,
                ADVANTAGES=advantages,
                BLOCK_G=BLOCK_GROUPS,
                BLOCK_K=BLOCK_ROLLOUTS,
            )
    return floats, integers, more, rollout_baseline, advantage
