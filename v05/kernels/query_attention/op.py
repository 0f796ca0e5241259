"""The public `query_attention`: the adapter's attention over ragged prompts, projections and layer norms included."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.query_attention import reference
from v05.kernels.query_attention.rules import AttentionWeights, check_shapes
from v05.kernels.query_attention.rules import check_values as check_attention_values


def query_attention(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    weights: AttentionWeights,
    *,
    heads: int = 3,
    eps: float = 1e-5,
    check_values: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attends from each prompt's queries to its own tokens; differentiable in states, queries and weights.

    Nothing of the size queries x tokens is kept: memory grows with tokens alone, and a prompt's features have the
    same bits whatever else is in the batch.

    Args:
        states: `[T, D]` float32, float64, bfloat16 or float16: token states of all prompts, one after the other, not
            normalised. Rows may lie apart (a slice of something wider) without a copy.
        offsets: `[B+1]` int64, ascending from 0 to T; a prompt may be empty.
        queries: `[B, Q, E]` floating, E = 2 heads: the raw queries of each prompt; their layer norm is applied here.
        weights: of the adapter; queries and weights are cast to the working dtype, that of the features.
        heads: 1 to 8, each of width 2.
        eps: added to the variance by both layer norms.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"`, `"triton"`, `"cuda"`.

    Returns:
        `[B, Q * E]` float32, or float64 for float64 states. An empty prompt attends to nothing, which counts as 0: its
        features are the output bias, and its queries have gradient 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: the residual query adapter of V0, arXiv 2602.03584.
    """
    check_shapes(states, offsets, queries, weights, heads, eps)
    chosen = dispatch.choose("query_attention", states.device.type, backend)
    if check_values or (chosen == "reference" and states.device.type == "cpu" and not torch.compiler.is_compiling()):
        check_attention_values(states.detach(), offsets, queries.detach(), weights)
    dtype = segments.working_dtype(states)
    queries, cast = queries.to(dtype), AttentionWeights(*(given.to(dtype) for given in weights))
    return reference.query_attention(states, offsets, queries, cast, heads, eps)
