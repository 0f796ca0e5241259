"""Advantages in Triton: one launch over tiles of groups, after the moments of the batch where they are asked for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from v05.kernels import segments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.advantage.triton_moments import batch_moments
from v05.kernels.device import on_device_of
from v05.kernels.shrinkage.triton import (
    BLOCK_GROUPS,
    BLOCK_ROLLOUTS,
    fused_baseline,
    load_groups,
    load_tile,
    scalar,
    shifted_sum,
)

FUSED = tl.constexpr(int(Baseline.FUSED))
FUSED_LOO = tl.constexpr(int(Baseline.FUSED_LOO))
LOO = tl.constexpr(int(Baseline.LOO))
BATCH = tl.constexpr(int(Baseline.BATCH))
GIVEN = tl.constexpr(int(Baseline.GIVEN))
BY_LENGTH = tl.constexpr(int(Baseline.BY_LENGTH))
BY_GROUP = tl.constexpr(int(Scale.GROUP))
BY_BATCH = tl.constexpr(int(Scale.BATCH))
BY_BASELINE = tl.constexpr(int(Scale.BASELINE))


@triton.jit(do_not_specialize=["groups"])
def advantage_kernel(
    rewards,
    offsets,
    prior,
    lengths,
    moments,
    out,
    groups: tl.int64,
    low: tl.float64,
    high: tl.float64,
    eps: tl.float64,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Advantages of BLOCK_G groups; moments: mean and std + eps of the batch; a given baseline comes as the prior."""
    acc: tl.constexpr = out.dtype.element_ty
    o_group, m_group, begin, end, first = load_groups(rewards, offsets, groups, acc, BLOCK_G)
    s = scalar((high - low) * (high - low) * 0.25, acc)
    a, b, floor = scalar(low, acc), scalar(high, acc), scalar(eps, acc)
    k = (end - begin).to(acc)
    total = shifted_sum(rewards, begin, end, first, acc, BLOCK_G, BLOCK_K)
    mean = first + total / tl.maximum(k, 1)
    common = mean
    value = mean
    if BASELINE <= FUSED_LOO:
        value = tl.load(prior + o_group, mask=m_group, other=0).to(acc)
        _deviation, common = fused_baseline(mean, k, value, s)
    if BASELINE == BATCH:
        common = tl.zeros([BLOCK_G], acc) + tl.load(moments)
    if BASELINE == BY_LENGTH:  # the first reward where all lengths are 0
        tokens = tl.zeros([BLOCK_G], acc)
        shifted = tl.zeros([BLOCK_G], acc)
        for start in range(0, tl.max(end - begin), BLOCK_K):
            o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
            b_length = tl.load(lengths + o_rollout, mask=m_rollout, other=0)
            tokens += tl.sum(b_length, axis=1)
            shifted += tl.sum(b_length * (b_reward - first[:, None]), axis=1)
        common = first + shifted / tl.where(tokens > 0, tokens, 1)
    divisor = tl.full([BLOCK_G], 1, acc)
    if SCALE == BY_BATCH:
        divisor *= tl.load(moments + 1)
    if SCALE == BY_GROUP:
        squares = tl.zeros([BLOCK_G], acc)
        for start in range(0, tl.max(end - begin), BLOCK_K):
            _o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
            centred = tl.where(m_rollout, b_reward - mean[:, None], 0)
            squares += tl.sum(centred * centred, axis=1)
        divisor = tl.where(squares > 0, tl.sqrt(squares / tl.maximum(k - 1, 1)) + floor, divisor)
    for start in range(0, tl.max(end - begin), BLOCK_K):
        o_rollout, m_rollout, b_reward = load_tile(rewards, begin, end, start, acc, BLOCK_K)
        baseline = tl.broadcast_to(common[:, None], [BLOCK_G, BLOCK_K])
        if BASELINE == GIVEN:
            baseline = tl.load(prior + o_rollout, mask=m_rollout, other=0).to(acc)
        if BASELINE == LOO or BASELINE == FUSED_LOO:
            others = (k - 1)[:, None]
            rest = first[:, None] + (total[:, None] - (b_reward - first[:, None])) / tl.maximum(others, 1)
            if BASELINE == LOO:
                baseline = tl.where(others > 0, rest, b_reward)
            else:
                _b_deviation, baseline = fused_baseline(rest, others, value[:, None], s)
        scale = tl.broadcast_to(divisor[:, None], [BLOCK_G, BLOCK_K])
        if SCALE == BY_BASELINE:
            variance = tl.maximum((b - baseline) * (baseline - a), floor)
            scale = tl.sqrt(tl.where(variance > 0, variance, 1))
        tl.store(out + o_rollout, (b_reward - baseline) / scale, mask=m_rollout)


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor | None,
    lengths: Tensor | None,
    baseline: Baseline,
    scale: Scale,
    low: float,
    high: float,
    eps: float,
) -> Tensor:
    """Same contract as the reference; one launch beyond the moments of the batch, no synchronisation."""
    rewards, offsets = rewards.contiguous(), offsets.contiguous()
    out = rewards.new_empty(rewards.shape, dtype=segments.working_dtype(rewards))
    groups = offsets.numel() - 1
    if groups == 0 or rewards.numel() == 0:
        return out
    moments = rewards
    if baseline is Baseline.BATCH or scale is Scale.BATCH:
        moments = batch_moments(rewards, lengths if baseline is Baseline.BATCH else None, eps)
    with on_device_of(rewards):
        advantage_kernel[(triton.cdiv(groups, BLOCK_GROUPS),)](
            rewards,
            offsets,
            rewards if prior is None else prior.contiguous(),
            rewards if lengths is None else lengths.contiguous(),
            moments,
            out,
            groups,
            low,
            high,
            eps,
            BASELINE=int(baseline),
            SCALE=int(scale),
            BLOCK_G=BLOCK_GROUPS,
            BLOCK_K=BLOCK_ROLLOUTS,
        )
    return out
