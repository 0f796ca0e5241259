"""Log-probs on the CPU: allocates the outputs and calls csrc/cpu/token_logprob.cpp, which also looks for bad values."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.token_logprob.rules import check_values, rows_of


def unchecked(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `token_logprob`, and the first row with a value that is not allowed, which is not written, or -1."""
    logits, targets = rows_of(logits), targets.contiguous()
    if temperatures is not None:
        temperatures = temperatures.to(torch.float64).contiguous()
    dtype, (rows, columns) = segments.working_dtype(logits), logits.shape
    logprob, entropy, statistics = (logits.new_empty(size, dtype=dtype) for size in (rows, rows, (2, rows)))
    bad = _cpu.token_logprob(
        segments.DTYPES.index(logits.dtype),
        logits.data_ptr(),
        logits.stride(0),
        rows,
        columns,
        targets.data_ptr(),
        ignore_index,
        segments.address(temperatures),
        temperature,
        logprob.data_ptr(),
        entropy.data_ptr(),
        statistics.data_ptr(),
        statistics.data_ptr() + rows * statistics.element_size(),
    )
    return logprob, entropy, statistics, bad


def token_logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob and entropy as the reference, and statistics `[2, T]` of each row: largest logit, log of its sum."""
    logprob, entropy, statistics, bad = unchecked(logits, targets, temperatures, temperature, ignore_index)
    if bad >= 0:
        check_values(logits, targets, temperatures, ignore_index)
    return logprob, entropy, statistics


def token_logprob_backward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logits: Tensor | None = None,
) -> Tensor:
    """Gradient `[T, V]` of the logits, in their dtype; into grad_logits, which may be the logits, where given."""
    logits, targets = rows_of(logits), targets.contiguous()
    if temperatures is not None:
        temperatures = temperatures.to(torch.float64).contiguous()
    grad_logprob = None if grad_logprob is None else grad_logprob.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    rows, columns = logits.shape
    if grad_logits is None:
        grad_logits = logits.new_empty(rows, columns)
    _cpu.token_logprob_backward(
        segments.DTYPES.index(logits.dtype),
        logits.data_ptr(),
        logits.stride(0),
        rows,
        columns,
        targets.data_ptr(),
        ignore_index,
        segments.address(temperatures),
        temperature,
        entropy.data_ptr(),
        statistics.data_ptr(),
        statistics.data_ptr() + rows * statistics.element_size(),
        segments.address(grad_logprob),
        segments.address(grad_entropy),
        grad_logits.data_ptr(),
    )
    return grad_logits
