"""The public `query_attention`: the adapter's attention over ragged prompts, projections and layer norms included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import custom_op
from v05.kernels.query_attention import reference
from v05.kernels.query_attention.buffers import Saved, make_gradients, make_outputs
from v05.kernels.query_attention.rules import AttentionWeights, check_shapes
from v05.kernels.query_attention.rules import check_values as check_attention_values


@custom_op("v05::query_attention")
def _query_attention(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    heads: int,
    eps: float,
    backend: str,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = dispatch.implementation("query_attention", backend).query_attention
    features, saved = run(states, offsets, queries, weights, heads, eps)
    return features, *saved


@_query_attention.register_fake
def _(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    heads: int,
    eps: float,
    backend: str,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    features, saved = make_outputs(states, queries, heads)
    return features, *saved


@custom_op("v05::query_attention_backward")
def _query_attention_backward(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad_features: Tensor,
    heads: int,
    eps: float,
    for_states: bool,
    backend: str,
) -> list[Tensor]:
    run = dispatch.implementation("query_attention", backend).query_attention_backward
    return run(states, offsets, queries, weights, Saved(*saved), grad_features, heads, eps, for_states)


@_query_attention_backward.register_fake
def _(
    states: Tensor,
    offsets: Tensor,
    queries: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad_features: Tensor,
    heads: int,
    eps: float,
    for_states: bool,
    backend: str,
) -> list[Tensor]:
    return make_gradients(states, queries, weights, for_states)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    states, offsets, queries, ctx.heads, ctx.eps, ctx.backend, weights = inputs
    ctx.save_for_backward(states, offsets, queries, *output[1:], *weights)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_features: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    states, offsets, queries, *rest = ctx.saved_tensors
    kept = len(Saved._fields)
    saved, weights = rest[:kept], rest[kept:]
    if grad_features is None:
        return (*[None] * 6, [None] * len(weights))
    by_states, by_queries, *by_weights = _query_attention_backward(
        states,
        offsets,
        queries,
        weights,
        saved,
        grad_features,
        ctx.heads,
        ctx.eps,
        ctx.needs_input_grad[0],
        ctx.backend,
    )
    return by_states if ctx.needs_input_grad[0] else None, None, by_queries, None, None, None, by_weights


_query_attention.register_autograd(_backward, setup_context=_save)


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
        heads: 1 to 4, each of width 2.
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
    chosen = dispatch.backend_for("query_attention", states, backend)
    if check_values or (chosen == "reference" and segments.readable(states)):
        check_attention_values(states.detach(), offsets, queries.detach(), weights)
    dtype = segments.working_dtype(states)
    queries, cast = segments.cast(queries, dtype), AttentionWeights(*(segments.cast(w, dtype) for w in weights))
    if chosen == "reference":
        return reference.query_attention(states, offsets, queries, cast, heads, eps)
    return _query_attention(states, offsets, queries, heads, eps, chosen, list(cast))[0]
