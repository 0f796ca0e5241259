"""Gradients of the adapter's small weights, from sums over rows of gradient times input."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels.query_attention.rules import AttentionWeights


def _after_norm(sums: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight, bias, scale, shift of weight (hat * scale + shift) + bias, from sums of gradient x hat."""
    along, total = sums[:, :-1], sums[:, -1:]
    by_weight = along * scale + total * shift
    return by_weight, total.squeeze(1), (weight * along).sum(0), (weight * total).sum(0)


def weight_gradients(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    projection: Tensor,
    weights: AttentionWeights,
) -> list[Tensor]:
    """Gradients in the order of `AttentionWeights`.

    Args:
        output, query, key, value: `[E, E + 1]`: sums of the gradient after a projection times its input, which for
            query and key is the normalised one before scale and shift; the last column sums the gradient alone.
        bias: `[E]`, of the projection of the states.
        projection: `[E, D]`, its weight.
        weights: of the forward, in the working dtype.
    """
    w, width = weights, weights.out_bias.numel()
    by_query, by_key, _ = w.in_weight.split(width)
    of_query, query_bias, query_scale, query_shift = _after_norm(
        query, by_query, w.query_norm_weight, w.query_norm_bias
    )
    of_key, key_bias, key_scale, key_shift = _after_norm(key, by_key, w.key_norm_weight, w.key_norm_bias)
    gradients = AttentionWeights(
        projection,
        bias,
        query_scale,
        query_shift,
        key_scale,
        key_shift,
        torch.cat([of_query, of_key, value[:, :-1]]),
        torch.cat([query_bias, key_bias, value[:, -1]]),
        output[:, :-1],
        output[:, -1],
    )
    return [gradient.to(w.in_weight.dtype).contiguous() for gradient in gradients]
