"""The adapter's attention as torch.nn.MultiheadAttention computes it, on padded states."""

import torch
from torch.nn.functional import layer_norm, linear

from v05.kernels import AttentionWeights


def attention_of(weights: AttentionWeights, heads: int) -> torch.nn.MultiheadAttention:
    """A module whose parameters are the weights themselves, gradients included."""
    module = torch.nn.MultiheadAttention(weights.out_bias.numel(), heads, batch_first=True)
    for owner, name, value in (
        (module, "in_proj_weight", weights.in_weight),
        (module, "in_proj_bias", weights.in_bias),
        (module.out_proj, "weight", weights.out_weight),
        (module.out_proj, "bias", weights.out_bias),
    ):
        del owner._parameters[name]
        setattr(owner, name, value)
    return module


def padded(states, offsets):
    """States `[B, longest, D]`, zeros after each prompt's own, and a mask `[B, longest]` that is true there."""
    parts = [states[begin:end] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    filled = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(part) for part in parts], device=states.device)
    return filled, torch.arange(filled.shape[1], device=states.device) >= lengths[:, None]


def attend_padded(filled, mask, queries, weights: AttentionWeights, module, eps=1e-5):
    """Features `[B, Q * E]` of states `[B, longest, D]`."""
    w, width = weights, queries.shape[2]
    kv = linear(filled, w.projection_weight, w.projection_bias)
    q = layer_norm(queries, (width,), w.query_norm_weight, w.query_norm_bias, eps)
    k = layer_norm(kv, (width,), w.key_norm_weight, w.key_norm_bias, eps)
    return module(q, k, kv, key_padding_mask=mask, need_weights=False)[0].flatten(1)
