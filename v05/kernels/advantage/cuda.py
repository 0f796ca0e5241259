"""Advantages in CUDA C++: launches csrc/cuda/advantage.cu on the current stream; batch statistics are torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.advantage.reference import batch_moments
from v05.kernels.device import on_device_of, stream_of


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
    """Same contract as the reference; one launch beyond the statistics of the batch, no synchronisation."""
    rewards, offsets = rewards.contiguous(), offsets.contiguous()
    prior = None if prior is None else prior.contiguous()
    out = torch.empty_like(rewards)
    moments = None
    if baseline is Baseline.BATCH or scale is Scale.BATCH:
        moments = torch.stack(batch_moments(rewards, lengths, eps))
    with on_device_of(rewards):
        _cuda.advantage(
            rewards.data_ptr(),
            offsets.data_ptr(),
            segments.address(prior),
            segments.address(moments),
            offsets.numel() - 1,
            int(baseline),
            int(scale),
            low,
            high,
            eps,
            out.data_ptr(),
            stream_of(rewards),
            rewards.dtype == torch.float64,
        )
    return out
