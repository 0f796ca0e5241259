"""The adapter's attention in CUDA C++: allocates, and launches csrc/cuda/query_attention*.cu on the current stream."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.query_attention.buffers import Saved, make_gradients, make_inputs, make_outputs


def query_attention(
    states: Tensor, offsets: Tensor, queries: Tensor, weights: Sequence[Tensor], heads: int, eps: float
) -> tuple[Tensor, Saved]:
    """Same contract as the CPU backend; three launches, no synchronisation."""
    given = make_inputs(states, offsets, queries, weights)
    features, saved = make_outputs(states, queries, heads)
    prompts, count = queries.shape[:2]
    scratch = features.new_empty(_cuda.attention_scratch(states.shape[0], prompts, heads, count))
    with on_device_of(states):
        _cuda.query_attention(
            segments.DTYPES.index(states.dtype),
            given.addresses(),
            given.sizes(heads),
            eps,
            tuple(map(segments.address, saved)),
            scratch.data_ptr(),
            features.data_ptr(),
            stream_of(states),
        )
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
    sizes, gradients = given.sizes(heads), make_gradients(states, queries, weights, for_states)
    scratch = given.queries.new_empty(_cuda.attention_backward_scratch(*sizes[1:]))
    with on_device_of(states):
        _cuda.query_attention_backward(
            segments.DTYPES.index(states.dtype),
            given.addresses(),
            sizes,
            eps,
            tuple(map(segments.address, saved)),
            grad_features.data_ptr(),
            scratch.data_ptr(),
            tuple(map(segments.address, gradients)),
            stream_of(states),
        )
    return gradients
