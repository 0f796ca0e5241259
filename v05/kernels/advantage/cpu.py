"""Advantages on the CPU: checks values, allocates the output and calls csrc/cpu/advantage.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.advantage.estimators import Baseline, Scale
from v05.kernels.shrinkage.cpu import check


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
    """Same contract as the reference; statistics are accumulated in float64."""
    rewards, offsets = rewards.contiguous(), offsets.contiguous()
    prior = None if prior is None else prior.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    check(rewards, offsets, None if baseline is Baseline.GIVEN else prior, low, high)
    out = torch.empty_like(rewards)
    _cpu.advantage(
        rewards.data_ptr(),
        offsets.data_ptr(),
        segments.address(prior),
        segments.address(lengths),
        rewards.numel(),
        offsets.numel() - 1,
        int(baseline),
        int(scale),
        low,
        high,
        eps,
        out.data_ptr(),
        rewards.dtype == torch.float64,
    )
    return out
