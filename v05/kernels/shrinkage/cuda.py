"""Shrinkage in CUDA C++: allocates the outputs and launches csrc/cuda/shrinkage.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.shrinkage.rules import Budget, Outputs


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
    with on_device_of(rewards):
        _cuda.shrinkage(
            rewards.data_ptr(),
            offsets.data_ptr(),
            prior.data_ptr(),
            groups,
            *budget,
            floats.data_ptr(),
            integers.data_ptr(),
            more.data_ptr(),
            rollout_baseline.data_ptr() if leave_one_out else 0,
            advantage.data_ptr() if advantages else 0,
            stream_of(rewards),
            segments.DTYPES.index(rewards.dtype),
        )
    return floats, integers, more, rollout_baseline, advantage
