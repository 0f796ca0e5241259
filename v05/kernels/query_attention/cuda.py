"""The adapter's attention in CUDA C++: allocates, and launches csrc/cuda/query_attention*.cu on the current stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v05.kernels import _cuda, segments
from v05.kernels.device import on_device_of, stream_of
from v05.kernels.query_attention.assemble import weight_gradients
from v05.kernels.query_attention.buffers import Saved, make_inputs, make_outputs
from v05.kernels.query_attention.rules import HEAD


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
    (tokens, size), (prompts, count, width) = states.shape, queries.shape
    make = given.queries.new_empty
    scratch = [make(heads, tokens, 2 * HEAD) for _ in range(2)]
    scratch += [make(prompts, heads, count, 8), make(prompts, width, count), make(tokens, width)]
    of_queries = make(_cuda.attention_query_blocks(prompts * count), 2, width, width + 1)
    of_tokens = make(_cuda.attention_token_blocks(tokens), 3, width, width + 1)
    of_states = make(_cuda.attention_chunks(tokens), width, size)
    grad_states, grad_queries = states.new_empty(states.shape if for_states else (0,)), make(queries.shape)
    with on_device_of(states):
        _cuda.query_attention_backward(
            segments.DTYPES.index(states.dtype),
            given.addresses(),
            given.sizes(heads),
            eps,
            tuple(map(segments.address, saved)),
            grad_features.data_ptr(),
            tuple(map(segments.address, scratch)),
            grad_states.data_ptr() if for_states else 0,
            grad_queries.data_ptr(),
            tuple(map(segments.address, (of_queries, of_tokens, of_states))),
            stream_of(states),
        )
    sums = [partial.sum(0, dtype=torch.float64) for partial in (of_queries, of_tokens, of_states)]
    return [grad_states, grad_queries, *weight_gradients(sums[0], sums[1], sums[2], given.weights)]
