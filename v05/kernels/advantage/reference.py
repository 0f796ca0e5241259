"""Advantages in plain torch, the oracle: A = (r - baseline) / scale for every estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.shrinkage import reference as fusion
from v05.kernels.shrinkage.rules import group_sums


def unscaled_where_flat(squares: Tensor, degrees: Tensor, eps: float) -> Tensor:
    """std + eps from a sum of squares, and 1 where the std is 0 or undefined."""
    flat = (degrees <= 0) | (squares <= 0)
    return torch.where(flat, 1, (squares / degrees.clamp(min=1)).sqrt() + eps)


def batch_moments(rewards: Tensor, lengths: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Mean of the batch, and its std + eps; each reward counts as often as its sequence has tokens."""
    if rewards.numel() == 0:
        return rewards.new_zeros(()), rewards.new_ones(())
    weights = torch.ones_like(rewards) if lengths is None else lengths
    total = weights.sum()
    mean = rewards[0] + (weights * (rewards - rewards[0])).sum() / torch.where(total > 0, total, 1)
    return mean, unscaled_where_flat((weights * (rewards - mean).square()).sum(), total - 1, eps)


def group_advantage(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor | None,
    lengths: Tensor | None,
    baseline: int,
    scale: int,
    low: float,
    high: float,
    eps: float,
) -> Tensor:
    """Advantages `[N]` of rewards `[N]`; see the public function. A given baseline `[N]` comes in place of a prior."""
    s = ((high - low) / 2) ** 2
    first, shifted, ids, count = group_sums(rewards, offsets)
    k = count.to(rewards.dtype)
    mean = first + shifted / k.clamp(min=1)
    others = (k - 1)[ids]
    rest = first[ids] + (shifted[ids] - (rewards - first[ids])) / others.clamp(min=1)
    if baseline == Baseline.FUSED:
        assert prior is not None
        mu = fusion.fuse(mean, k, prior, s)[2][ids]
    elif baseline == Baseline.FUSED_LOO:
        assert prior is not None
        mu = fusion.fuse(rest, others, prior[ids], s)[2]
    elif baseline == Baseline.GIVEN:
        assert prior is not None
        mu = prior
    elif baseline == Baseline.BY_LENGTH:
        assert lengths is not None
        total = segments.segment_sum(lengths, ids, count.numel())
        weighed = segments.segment_sum(lengths * (rewards - first[ids]), ids, count.numel())
        mu = (first + weighed / torch.where(total > 0, total, 1))[ids]
    elif baseline == Baseline.LOO:
        mu = torch.where(others > 0, rest, rewards)
    elif baseline == Baseline.BATCH:
        mu = batch_moments(rewards, lengths, eps)[0].expand_as(rewards)
    else:
        mu = mean[ids]
    centred = rewards - mu
    if scale == Scale.GROUP:
        squares = segments.segment_sum((rewards - mean[ids]).square(), ids, count.numel())
        return centred / unscaled_where_flat(squares, k - 1, eps)[ids]
    if scale == Scale.BATCH:
        by_length = lengths if baseline == Baseline.BATCH else None
        return centred / batch_moments(rewards, by_length, eps)[1]
    if scale == Scale.BASELINE:
        variance = ((high - mu) * (mu - low)).clamp(min=eps)
        return centred / torch.where(variance > 0, variance, 1).sqrt()
    return centred
