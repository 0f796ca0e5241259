"""Calibrated fusion in CUDA C++: launches csrc/cuda/calibration.cu on the current stream."""

from __future__ import annotations

from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.calibration.buffers import allocate
from v05.kernels.calibration.rules import Outputs
from v05.kernels.device import on_device_of, stream_of
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
    """Same contract as the reference, but rewards may be of any of `segments.DTYPES`; three launches and nothing else
    on the device, no synchronisation."""
    rewards, offsets, prior = rewards.contiguous(), offsets.contiguous(), prior.contiguous()
    state = None if state is None else state.contiguous()
    out = allocate(rewards.numel(), prior, offsets, leave_one_out, advantages)
    with on_device_of(rewards):
        _cuda.calibrated(
            [segments.address(tensor) for tensor in (rewards, offsets, prior, state)],
            rewards.numel(),
            prior.numel(),
            *budget,
            state_decay,
            [segments.address(tensor) for tensor in out],
            stream_of(rewards),
            segments.DTYPES.index(rewards.dtype),
        )
    return out.outputs
