"""The adapter's attention in Triton: allocates, and launches the kernels of triton_forward and triton_backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from v05.kernels.device import on_device_of
from v05.kernels.query_attention.assemble import weight_gradients
from v05.kernels.query_attention.buffers import Inputs, Saved, make_inputs, make_outputs
from v05.kernels.query_attention.rules import HEAD
from v05.kernels.query_attention.triton_backward import queries_kernel, tokens_backward_kernel
from v05.kernels.query_attention.triton_forward import attend_kernel, keys_kernel, tokens_kernel
from v05.kernels.query_attention.triton_states import projection_backward_kernel, states_kernel

BLOCK_ROWS = 8  # tokens whose states are read together
BLOCK_COLUMNS = 128
CHUNK = 256  # tokens whose share of the projection's gradient is summed by itself
# Kernels with narrow rows are single warps without shared memory. Triton changes a small tile's layout by shuffles; in
# shared memory every thread would store its copy of a number, and copies of a sum of products differ in the last bit.
WARPS = 1
ROWS = 4  # queries or tokens of a program
PROJECTED = 64  # columns of states
PASSING_T, PASSING_Q = 16, 32  # tokens that pass by queries at a time, and queries that pass by tokens


def narrow_rows(heads: int) -> dict[str, int]:
    """How kernels with narrow rows are launched; their lanes are a power of two above the width."""
    return {"HEADS": heads, "PADDED": triton.next_power_of_2(HEAD * heads + 1), "num_warps": WARPS}


def query_attention(
    states: Tensor, offsets: Tensor, queries: Tensor, weights: Sequence[Tensor], heads: int, eps: float
) -> tuple[Tensor, Saved]:
    """Same contract as the CPU backend; two launches, no synchronisation."""
    states, offsets, queries, w = make_inputs(states, offsets, queries, weights)
    features, saved = make_outputs(states, queries, heads)
    (tokens, size), (prompts, count, width) = states.shape, queries.shape
    keys = torch.empty(2 * width, tokens, dtype=features.dtype, device=states.device)
    narrow = narrow_rows(heads)
    by_key = (w.key_norm_weight, w.key_norm_bias, w.in_weight, w.in_bias)
    blocks = triton.cdiv(count, ROWS)
    with on_device_of(states):
        if tokens:
            tokens_kernel[(triton.cdiv(tokens, ROWS),)](
                states,
                saved.kv,
                keys,
                w.projection_weight,
                w.projection_bias,
                *by_key,
                states.stride(0),
                tokens,
                size,
                eps,
                BLOCK_T=ROWS,
                BLOCK_D=PROJECTED,
                **narrow,
            )
        if prompts:
            attend_kernel[(prompts, blocks)](
                keys,
                offsets,
                queries,
                features,
                *saved[:3],
                w.query_norm_weight,
                w.query_norm_bias,
                w.in_weight,
                w.in_bias,
                w.out_weight,
                w.out_bias,
                tokens,
                count,
                eps,
                BLOCK_Q=ROWS,
                BLOCK_T=PASSING_T,
                **narrow,
            )
    return features, saved


def _by_queries(
    given: Inputs, saved: Saved, keys: Tensor, grad_features: Tensor, eps: float, narrow: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the queries, rows for the pass over tokens, and sums `[2, E, PADDED]` in float64."""
    (prompts, count, width), w = given.queries.shape, given.weights
    blocks = triton.cdiv(count, ROWS)
    rows = keys.new_empty(5, prompts, width // HEAD, count)
    sums = keys.new_empty(prompts * blocks, 2, width, narrow["PADDED"])
    grad_queries = torch.empty_like(given.queries)
    if prompts:
        queries_kernel[(prompts, blocks)](
            keys,
            given.offsets,
            given.queries,
            *saved[:3],
            grad_features,
            rows,
            grad_queries,
            sums,
            w.query_norm_weight,
            w.query_norm_bias,
            w.in_weight,
            w.in_bias,
            w.out_weight,
            keys.shape[1],
            prompts,
            count,
            eps,
            BLOCK_Q=ROWS,
            BLOCK_T=PASSING_T,
            **narrow,
        )
    return grad_queries, rows, sums.sum(0, dtype=torch.float64)


def _by_tokens(
    given: Inputs, saved: Saved, keys: Tensor, rows: Tensor, eps: float, narrow: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Gradient by kv `[T, E]`, and sums `[3, E, PADDED]` in float64."""
    (prompts, count, width), tokens = given.queries.shape, keys.shape[1]
    programs = tokens // ROWS + prompts if tokens else 0
    grad_kv = torch.empty_like(saved.kv)
    sums = keys.new_empty(programs, 3, width, narrow["PADDED"])
    if programs:
        tokens_backward_kernel[(programs,)](
            saved.kv,
            keys,
            given.offsets,
            rows,
            saved.largest,
            grad_kv,
            sums,
            given.weights.key_norm_weight,
            given.weights.in_weight,
            tokens,
            prompts,
            count,
            eps,
            BLOCK_T=ROWS,
            BLOCK_Q=PASSING_Q,
            **narrow,
        )
    return grad_kv, sums.sum(0, dtype=torch.float64)


def _by_states(given: Inputs, grad_kv: Tensor, heads: int, for_states: bool) -> tuple[Tensor, Tensor]:
    """Gradient of the states (empty unless wanted), and of the projection `[E, D]` in float64."""
    states, (tokens, size) = given.states, given.states.shape
    blocks, chunks = triton.cdiv(size, BLOCK_COLUMNS), triton.cdiv(tokens, CHUNK)
    partial = grad_kv.new_empty(chunks, grad_kv.shape[1], size)
    grad_states = states.new_empty(states.shape if for_states else (0,))
    tile = {"HEADS": heads, "BLOCK_T": BLOCK_ROWS, "BLOCK_D": BLOCK_COLUMNS}
    if tokens:
        projection_backward_kernel[(chunks, blocks)](
            states, grad_kv, partial, states.stride(0), tokens, size, CHUNK=CHUNK, **tile
        )
    if tokens and for_states:
        states_kernel[(triton.cdiv(tokens, BLOCK_ROWS), blocks)](
            grad_kv, given.weights.projection_weight, grad_states, tokens, size, **tile
        )
    return grad_states, partial.sum(0, dtype=torch.float64)


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
    """Same contract as the CPU backend; no synchronisation."""
    given = make_inputs(states, offsets, queries, weights)
    tokens, width, w = states.shape[0], HEAD * heads, given.weights
    narrow = narrow_rows(heads)
    keys = torch.empty(2 * width, tokens, dtype=queries.dtype, device=states.device)
    with on_device_of(states):
        if tokens:
            keys_kernel[(triton.cdiv(tokens, ROWS),)](
                saved.kv,
                keys,
                w.key_norm_weight,
                w.key_norm_bias,
                w.in_weight,
                w.in_bias,
                tokens,
                eps,
                BLOCK_T=ROWS,
                **narrow,
            )
        grad_queries, rows, of_queries = _by_queries(given, saved, keys, grad_features.contiguous(), eps, narrow)
        grad_kv, of_tokens = _by_tokens(given, saved, keys, rows, eps, narrow)
        grad_states, by_projection = _by_states(given, grad_kv, heads, for_states)
    small = weight_gradients(of_queries[..., : width + 1], of_tokens[..., : width + 1], by_projection, w)
    return [grad_states, grad_queries, *small]
