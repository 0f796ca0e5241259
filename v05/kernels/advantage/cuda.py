"""Advantages in CUDA C++: launches csrc/cuda/advantage.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.device import on_device_of, stream_of


def batch_moments(rewards: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    """The reference's mean and std + eps `[2]` of contiguous inputs, summed in float64: one launch, two if many."""
    n = rewards.numel()
    moments = rewards.new_empty(2, dtype=segments.working_dtype(rewards))
    partial = rewards.new_empty(_cuda.moment_blocks(n), 3, dtype=torch.float64)
    addresses = (rewards.data_ptr(), segments.address(lengths), n, eps, partial.data_ptr(), moments.data_ptr())
    _cuda.batch_moments(*addresses, stream_of(rewards), segments.DTYPES.index(rewards.dtype))
    return moments


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
    prior = None if prior is None else prior.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    out = rewards.new_empty(rewards.shape, dtype=segments.working_dtype(rewards))
    if rewards.numel() == 0:
        return out
    by_batch = baseline is Baseline.BATCH or scale is Scale.BATCH
    by_length = lengths if baseline is Baseline.BATCH else None
    with on_device_of(rewards):
        moments = batch_moments(rewards, by_length, eps) if by_batch else None
        _cuda.advantage(
            rewards.data_ptr(),
            offsets.data_ptr(),
            segments.address(prior),
            segments.address(lengths),
            segments.address(moments),
            offsets.numel() - 1,
            int(baseline),
            int(scale),
            low,
            high,
            eps,
            out.data_ptr(),
            stream_of(rewards),
            segments.DTYPES.index(rewards.dtype),
        )
    return out
