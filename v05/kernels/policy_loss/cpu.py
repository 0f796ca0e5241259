"""Policy losses on the CPU: allocates the outputs and calls csrc/cpu/policy_loss.cpp, which also finds bad values."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu
from v05.kernels.policy_loss.options import METRICS, Inputs, Kinds, Numbers, check_token_values


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient `[T]` by logprobs, and the metrics `[11]`; sums are accumulated in float64."""
    given = given.contiguous()
    logprobs, tokens = given.logprobs, given.tokens
    loss = logprobs.new_empty(())
    gradient = logprobs.new_empty(tokens)
    metrics = logprobs.new_empty(len(METRICS))
    valid = _cpu.policy_loss(
        given.addresses(),  # type: ignore[arg-type]
        tokens,
        given.sequences,
        given.per_token,
        kinds,
        by,
        loss.data_ptr(),
        gradient.data_ptr(),
        metrics.data_ptr(),
        logprobs.dtype == torch.float64,
    )
    if not valid:
        check_token_values(given, kinds)
    return loss, gradient, metrics


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient in place by a scalar; where that is 1, nothing is read or written."""
    return gradient if factor.item() == 1 else gradient.mul_(factor)
