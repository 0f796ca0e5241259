"""Policy losses in CUDA C++: allocates the outputs and launches csrc/cuda/policy_loss.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.policy_loss.options import Inputs, Kinds, Numbers
from v05.kernels.policy_loss.scratch import FIELDS, make_scratch


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; three launches, four at the level of sequences, no synchronisation."""
    given = given.contiguous()
    logprobs, tokens, sequences = given.logprobs, given.tokens, given.sequences
    loss, gradient, metrics = (logprobs.new_empty(size) for size in ((), tokens, FIELDS - 1))
    scratch = make_scratch(logprobs, sequences, kinds, _cuda.policy_blocks(tokens))
    with on_device_of(logprobs):
        _cuda.policy_loss(
            given.addresses(),
            tuple(values.data_ptr() for values in scratch),
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
