"""Policy losses in CUDA C++: allocates the outputs and launches csrc/cuda/policy_loss.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.policy_loss.options import FIELDS, Inputs, Kinds, Numbers, whole_sequences


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; one launch up to 2,048 tokens (8,192 on sm_90 and newer), or where a block (a
    cluster of eight) goes through all sequences; two beyond; no synchronisation."""
    given = given.contiguous()
    logprobs, tokens, sequences = given.logprobs, given.tokens, given.sequences
    loss, gradient, metrics = (logprobs.new_empty(size) for size in ((), tokens, FIELDS - 1))  # no two share memory
    with on_device_of(logprobs):
        blocks = _cuda.policy_blocks(tokens, sequences, whole_sequences(kinds))
        partial = logprobs.new_empty(FIELDS * blocks, dtype=torch.float64) if blocks > 1 else None
        _cuda.policy_loss(
            given.addresses(),
            segments.address(partial),
            tokens,
            sequences,
            given.per_token,
            kinds,
            by,
            gradient.data_ptr(),
            loss.data_ptr(),
            metrics.data_ptr(),
            stream_of(logprobs),
            logprobs.dtype == torch.float64,
        )
    return loss, gradient, metrics


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient in place by a scalar on its device; where that is 1, nothing is read or written."""
    wide = gradient.dtype == torch.float64
    with on_device_of(gradient):
        address = gradient.data_ptr()
        _cuda.scale_unless_one(address, gradient.numel(), factor.data_ptr(), stream_of(gradient), wide)
    return gradient
