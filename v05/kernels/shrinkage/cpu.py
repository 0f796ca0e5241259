"""Shrinkage on the CPU: allocates the outputs and calls csrc/cpu/shrinkage.cpp, which also looks for bad values."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.shrinkage.rules import SLACK, Budget, Outputs, check_group_values


def check(rewards: Tensor, offsets: Tensor, prior: Tensor | None, low: float, high: float) -> None:
    """Looks for bad values in native code, and lets `check_group_values` say what is wrong with them."""
    slack = SLACK * (high - low)
    valid = _cpu.groups_valid(
        rewards.data_ptr(),
        offsets.data_ptr(),
        segments.address(prior),
        rewards.numel(),
        offsets.numel() - 1,
        low - slack,
        high + slack,
        rewards.dtype == torch.float64,
    )
    if not valid:
        check_group_values(rewards, offsets, prior, low, high)


def shrinkage(
    rewards: Tensor, offsets: Tensor, prior: Tensor, budget: Budget, leave_one_out: bool, advantages: bool
) -> Outputs:
    """Same contract as the reference; statistics are accumulated in float64."""
    rewards, offsets, prior = rewards.contiguous(), offsets.contiguous(), prior.contiguous()
    check(rewards, offsets, prior, budget.low, budget.high)
    groups = offsets.numel() - 1
    floats = rewards.new_empty(6, groups)
    integers = offsets.new_empty(2, groups)
    more = offsets.new_empty(groups, dtype=torch.bool)
    rollout_baseline = rewards.new_empty(rewards.numel() if leave_one_out else 0)
    advantage = rewards.new_empty(rewards.numel() if advantages else 0)
    _cpu.shrinkage(
        rewards.data_ptr(),
        offsets.data_ptr(),
        prior.data_ptr(),
        rewards.numel(),
        groups,
        *budget,
        floats.data_ptr(),
        integers.data_ptr(),
        more.data_ptr(),
        rollout_baseline.data_ptr() if leave_one_out else 0,
        advantage.data_ptr() if advantages else 0,
        rewards.dtype == torch.float64,
    )
    return floats, integers, more, rollout_baseline, advantage
