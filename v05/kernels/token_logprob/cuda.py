"""Log-probs in CUDA C++: allocates the outputs and launches csrc/cuda/token_logprob.cu on the current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.token_logprob.rules import rows_of


def _inputs(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, ignore_index: int
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, int, int, int]]:
    """The tensors as the kernels take them, to be held while these run, and stride, rows, columns, ignored target."""
    logits, targets = rows_of(logits), targets.contiguous()
    temperatures = None if temperatures is None else temperatures.to(torch.float64).contiguous()
    return (logits, targets, temperatures), (logits.stride(0), *logits.shape, ignore_index)


def token_logprob(
    logits: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; one launch, no synchronisation."""
    held, sizes = _inputs(logits, targets, temperatures, ignore_index)
    rows, dtype = logits.shape[0], segments.working_dtype(logits)
    logprob, entropy = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(2))
    statistics = torch.empty(2, rows, dtype=dtype, device=logits.device)
    largest = statistics.data_ptr()
    outputs = (logprob.data_ptr(), entropy.data_ptr(), largest, largest + rows * statistics.element_size())
    kind, addresses = segments.DTYPES.index(logits.dtype), tuple(map(segments.address, held))
    with on_device_of(logits):
        _cuda.token_logprob(kind, addresses, sizes, temperature, outputs, stream_of(logits))
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
    held, sizes = _inputs(logits, targets, temperatures, ignore_index)
    gradients = [None if given is None else given.contiguous() for given in (grad_logprob, grad_entropy)]
    if grad_logits is None:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    largest = statistics.data_ptr()
    saved = (entropy.data_ptr(), largest, largest + logits.shape[0] * statistics.element_size())
    with on_device_of(logits):
        _cuda.token_logprob_backward(
            segments.DTYPES.index(logits.dtype),
            tuple(map(segments.address, held)),
            sizes,
            temperature,
            saved,
            tuple(map(segments.address, gradients)),
            grad_logits.data_ptr(),
            logits.shape[1],
            stream_of(logits),
        )
    return grad_logits
