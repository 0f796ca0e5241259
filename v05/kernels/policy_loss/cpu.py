"""Policy losses on the CPU: allocates the outputs and calls csrc/cpu/policy_loss.cpp, which also finds bad values."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu
from v05.kernels.policy_loss.options import METRICS, Kinds, Numbers, check_token_values


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    offsets: Tensor,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    selected: Tensor | None,
    kinds: Kinds,
    by: Numbers,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its gradient `[T]` by logprobs, and the metrics `[11]`; sums are accumulated in float64."""
    given = (logprobs, old_logprobs, advantages, weights, ref_logprobs, sampler_logprobs, selected, offsets)
    held = [None if values is None else values.contiguous() for values in given]
    tokens, sequences = logprobs.numel(), offsets.numel() - 1
    loss = logprobs.new_empty(())
    gradient = logprobs.new_empty(tokens)
    metrics = logprobs.new_empty(len(METRICS))
    valid = _cpu.policy_loss(
        tuple(0 if values is None else values.data_ptr() for values in held),  # type: ignore[arg-type]
        tokens,
        sequences,
        advantages.numel() != sequences,
        kinds,
        by,
        loss.data_ptr(),
        gradient.data_ptr(),
        metrics.data_ptr(),
        logprobs.dtype == torch.float64,
    )
    if not valid:
        check_token_values(logprobs, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, kinds)
    return loss, gradient, metrics
