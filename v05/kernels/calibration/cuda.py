"""Calibrated fusion in CUDA C++: launches csrc/cuda/calibration.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda
from v05.kernels.calibration.native import addresses, allocate
from v05.kernels.calibration.rules import Outputs
from v05.kernels.device import on_device_of, stream_of
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
    """Same contract as the reference; three launches, no synchronisation."""
    given = [tensor.contiguous() for tensor in (rewards, offsets, prior, graded, state)]
    out = allocate(given[0], given[1], leave_one_out, advantages)
    n, groups, wide = rewards.numel(), prior.numel(), rewards.dtype == torch.float64
    with on_device_of(rewards):
        _cuda.calibrated(addresses(given), n, groups, *budget, addresses(out), stream_of(rewards), wide)
    return out.outputs
