"""Calibrated fusion on the CPU: calls csrc/cpu/calibration.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu
from v05.kernels.calibration.native import addresses, allocate
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
    out = allocate(given[0], given[1], leave_one_out, advantages)
    n, groups, wide = rewards.numel(), prior.numel(), rewards.dtype == torch.float64
    _cpu.calibrated(addresses(given), n, groups, *budget, addresses(out), wide)
    return out.outputs
