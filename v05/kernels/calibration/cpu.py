"""Calibrated fusion on the CPU: calls csrc/cpu/calibration.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.calibration.buffers import allocate
from v05.kernels.calibration.rules import Outputs
from v05.kernels.shrinkage.cpu import check
from v05.kernels.shrinkage.rules import Budget


def calibrated(
    rewards: Tensor,
    offsets: Tensor,
    prior: Tensor,
    state: Tensor | None,
    state_decay: float,
    budget: Budget,
    leave_one_out: bool,
    advantages: bool,
) -> Outputs:
    """Same contract as the reference; each group in float64, the mixture in the working dtype."""
    rewards, offsets, prior = rewards.contiguous(), offsets.contiguous(), prior.contiguous()
    state = None if state is None else state.contiguous()
    check(rewards, offsets, prior, budget.low, budget.high)
    out = allocate(rewards.numel(), prior, offsets, leave_one_out, advantages)
    _cpu.calibrated(
        [segments.address(tensor) for tensor in (rewards, offsets, prior, state)],
        rewards.numel(),
        prior.numel(),
        *budget,
        state_decay,
        [segments.address(tensor) for tensor in out],
        rewards.dtype == torch.float64,
    )
    return out.outputs
