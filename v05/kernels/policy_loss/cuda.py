"""Policy losses in CUDA C++: allocates the outputs and launches csrc/cuda/policy_loss.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.policy_loss.options import Correction, Inputs, Kinds, Numbers
from v05.kernels.policy_loss.scratch import FIELDS


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; one launch up to 1,024 tokens, two beyond, one or two more for options on whole
    sequences; no synchronisation."""
    given = given.contiguous()
    logprobs, tokens, sequences = given.logprobs, given.tokens, given.sequences
    sums, gradient = logprobs.new_empty(FIELDS), logprobs.new_empty(tokens)
    with on_device_of(logprobs):
        scratch, places = _scratch(logprobs, tokens, sequences, kinds)
        _cuda.policy_loss(
            given.addresses(),
            places,
            tokens,
            sequences,
            given.per_token,
            kinds,
            by,
            gradient.data_ptr(),
            sums.data_ptr(),
            sums.data_ptr() + sums.element_size(),
            stream_of(logprobs),
            logprobs.dtype == torch.float64,
        )
    del scratch  # held until here
    return sums[0], gradient, sums[1:]


def _scratch(logprobs: Tensor, tokens: int, sequences: int, kinds: Kinds) -> tuple[Tensor, list[int]]:
    """Memory for one call, and where in it the parts of csrc/cuda/ops.h's PolicyScratch begin, each aligned."""
    size, level, corrects = logprobs.element_size(), kinds.level == 1, kinds.correction >= Correction.SEQUENCE_TRUNCATE
    lengths = (
        8 * FIELDS * _cuda.policy_blocks(tokens),
        *(size * sequences * asked for asked in (level, level, corrects)),
        size * tokens * level,
    )
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + -(-length // 16) * 16)
    memory = torch.empty(ends[-1], dtype=torch.uint8, device=logprobs.device)
    return memory, [memory.data_ptr() + end for end in ends[:-1]]


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient in place by a scalar on its device; where that is 1, nothing is read or written."""
    wide = gradient.dtype == torch.float64
    with on_device_of(gradient):
        address = gradient.data_ptr()
        _cuda.scale_unless_one(address, gradient.numel(), factor.data_ptr(), stream_of(gradient), wide)
    return gradient
