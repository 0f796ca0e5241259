"""Gradients of the adapter's small weights, from sums over rows of gradient times input."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels.query_attention.rules import AttentionWeights


def weight_gradients(
    of_queries: Tensor, of_tokens: Tensor, projection: Tensor, weights: AttentionWeights
) -> list[Tensor]:
    """Gradients in the order of `AttentionWeights`.

    Args:
        of_queries: `[2, E, E + 1]`, of the output and the query projection: sums of the gradient after a projection
            times its input, which for query and key is the normalised one before scale and shift; the last column sums
            the gradient alone.
        of_tokens: `[3, E, E + 1]`: the same of key and value; and, in its last column, of the states' projection.
        projection: `[E, D]`, the weight of the states' projection.
        weights: of the forward, in the working dtype.
    """
    w, width = weights, weights.out_bias.numel()
    output, query = of_queries
    key, value, states = of_tokens
    # of query and key: weight (hat * scale + shift) + bias
    scale = torch.stack([w.query_norm_weight, w.key_norm_weight]).unsqueeze(1)
    shift = torch.stack([w.query_norm_bias, w.key_norm_bias]).unsqueeze(1)
    weight, sums = w.in_weight[: 2 * width].view(2, width, width), torch.stack([query, key])
    along, total = sums[..., :-1], sums[..., -1:]
    by_weight = (along * scale + total * shift).view(2 * width, width)
    (query_scale, key_scale), (query_shift, key_shift) = (weight * along).sum(1), (weight * total).sum(1)
    gradients = AttentionWeights(
        projection,
        states[:, -1],
        query_scale,
        query_shift,
        key_scale,
        key_shift,
        torch.cat([by_weight, value[:, :-1]]),
        torch.cat([total.flatten(), value[:, -1]]),
        output[:, :-1],
        output[:, -1],
    )
    dtype, dense = w.in_weight.dtype, torch.contiguous_format
    return [gradient.to(dtype, copy=True, memory_format=dense) for gradient in gradients]  # no two share memory
