"""The adapter's attention on the CPU: allocates the outputs and calls csrc/cpu/query_attention.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from v05.kernels import _cpu, segments
from v05.kernels.query_attention.buffers import Saved, make_gradients, make_inputs, make_outputs
from v05.kernels.query_attention.rules import check_values


def query_attention(
    states: Tensor, offsets: Tensor, queries: Tensor, weights: Sequence[Tensor], heads: int, eps: float
) -> tuple[Tensor, Saved]:
    """Features as the reference, and what the backward needs; queries and weights are in the working dtype."""
    given = make_inputs(states, offsets, queries, weights)
    features, saved = make_outputs(states, queries, heads)
    good = _cpu.query_attention(
        segments.DTYPES.index(states.dtype),
        given.addresses(),
        given.sizes(heads),
        eps,
        tuple(values.data_ptr() for values in saved),
        features.data_ptr(),
    )
    if not good:
        check_values(*given)
    return features, saved


def query_attention_backward(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    weights: Sequence[Tensor],
    saved: Saved,
    grad_features: Tensor,
    heads: int,
    eps: float,
    for_states: bool,
) -> list[Tensor]:
    """Gradients of the states `[T, D]` (empty unless asked for), the queries and the weights."""
    given, grad_features = make_inputs(states, offsets, queries, weights), grad_features.contiguous()
    gradients = make_gradients(states, queries, weights, for_states)
    _cpu.query_attention_backward(
        segments.DTYPES.index(states.dtype),
        given.addresses(),
        given.sizes(heads),
        eps,
        tuple(values.data_ptr() for values in saved),
        grad_features.data_ptr(),
        tuple(values.data_ptr() if values.numel() else 0 for values in gradients),
    )
    return gradients
