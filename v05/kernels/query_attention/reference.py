"""Attention of a prompt's queries over its tokens in plain differentiable torch, the oracle of every kernel.

kv = states Wp' + bp; q = Wq LN(queries) + bq; k = Wk LN(kv) + bk; v = Wv kv + bv; per head softmax(q k' / sqrt(2)) v
over the prompt's own tokens; the heads side by side through the output projection. It needs `[T, heads, Q]` floats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from v05.kernels import segments
from v05.kernels.query_attention.rules import HEAD, AttentionWeights


def query_attention(
    states: Tensor, offsets: Tensor, queries: Tensor, weights: AttentionWeights, heads: int, eps: float
) -> Tensor:
    """Features `[B, Q * E]` in the working dtype of the states, in which all is computed."""
    (prompts, count, width), tokens = queries.shape, states.shape[0]
    w = weights
    kv = linear(states.to(w.in_weight.dtype), w.projection_weight, w.projection_bias)
    by_query, by_key, by_value = zip(w.in_weight.split(width), w.in_bias.split(width), strict=True)
    q = linear(layer_norm(queries, (width,), w.query_norm_weight, w.query_norm_bias, eps), *by_query)
    k = linear(layer_norm(kv, (width,), w.key_norm_weight, w.key_norm_bias, eps), *by_key)
    v = linear(kv, *by_value)
    q = q.view(prompts, count, heads, HEAD).transpose(1, 2)
    k, v = (values.view(tokens, heads, 1, HEAD) for values in (k, v))
    ids = segments.segment_ids(offsets, tokens)
    scores = (q[ids] * k).sum(-1) / math.sqrt(HEAD)
    own = ids[:, None, None].expand_as(scores)
    largest = scores.new_full((prompts, heads, count), -math.inf).scatter_reduce(0, own, scores.detach(), "amax")
    powers = torch.exp(scores - largest[ids])
    total = segments.segment_sum(powers, ids, prompts)
    attended = segments.segment_sum((powers[..., None] * v), ids, prompts)
    attended = attended / torch.where(total > 0, total, 1)[..., None]
    attended = attended.transpose(1, 2).reshape(prompts, count, width)
    return linear(attended, w.out_weight, w.out_bias).view(prompts, count * width)
