"""Calibrated fusion on the CPU: allocates the outputs and calls csrc/cpu/calibration.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu
from v05.kernels.calibration.components import COMPONENTS
from v05.kernels.calibration.rules import Outputs
from v05.kernels.shrinkage.cpu import check
from v05.kernels.shrinkage.rules import Budget


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
    """Same contract as the reference; each group in float64, the mixture in the working dtype."""
    given = [tensor.contiguous() for tensor in (rewards, offsets, prior, graded, state)]
    check(given[0], given[1], given[2], budget.low, budget.high)
    n, groups = rewards.numel(), prior.numel()
    scratch = [rewards.new_empty(COMPONENTS, groups), rewards.new_empty(COMPONENTS)]
    floats, integers = rewards.new_empty(6, groups), offsets.new_empty(2, groups)
    more = torch.empty(groups, dtype=torch.bool)
    rollout_baseline, advantage = (rewards.new_empty(n if asked else 0) for asked in (leave_one_out, advantages))
    outputs = (floats, integers, more, rollout_baseline, advantage, torch.empty_like(given[4]))
    _cpu.calibrated(
        [tensor.data_ptr() for tensor in given],
        n,
        groups,
        *budget,
        [tensor.data_ptr() if tensor.numel() else 0 for tensor in (*scratch, *outputs)],
        rewards.dtype == torch.float64,
    )
    return outputs
