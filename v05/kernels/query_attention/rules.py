"""The adapter's weights, and what states, offsets, queries and weights are allowed to be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import segments

HEAD = 2  # width of a head: that of the published adapter, and the one that kernels are written for
MOST_HEADS = 4


class AttentionWeights(NamedTuple):
    """Weights of the adapter's attention, floating, of width E and for states of size D.

    The names of the published checkpoint: `proj_kv`, `ln_q`, `ln_kv`, `mha.in_proj_*` (rows for queries, keys, values)
    and `mha.out_proj`.
    """

    projection_weight: Tensor  # [E, D]
    projection_bias: Tensor  # [E]
    query_norm_weight: Tensor  # [E]
    query_norm_bias: Tensor  # [E]
    key_norm_weight: Tensor  # [E]
    key_norm_bias: Tensor  # [E]
    in_weight: Tensor  # [3 E, E]
    in_bias: Tensor  # [3 E]
    out_weight: Tensor  # [E, E]
    out_bias: Tensor  # [E]


_NAMES = tuple(f"weights.{name}" for name in AttentionWeights._fields)


def rows_of(states: Tensor) -> Tensor:
    """The states, copied only where the elements of a row do not lie side by side."""
    return states if states.shape[1] == 1 or states.stride(1) == 1 else states.contiguous()


def weight_shapes(width: int, size: int) -> tuple[tuple[int, ...], ...]:
    """The shape of each of `AttentionWeights`."""
    e = (width,)
    return ((width, size), e, e, e, e, e, (3 * width, width), (3 * width,), (width, width), e)


def _check_tensor(name: str, given: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    segments.check_tensor(name, given)
    if given.shape != shape:
        raise ValueError(f"{name} has shape {list(given.shape)}; allowed: {list(shape)}")
    if not given.dtype.is_floating_point:
        raise TypeError(f"{name} is {given.dtype}; allowed: a floating dtype")
    if given.device != device:
        raise ValueError(f"{name} is on {given.device}; allowed: {device}, where the states are")


def check_shapes(
    states: Tensor, offsets: Tensor, queries: Tensor, weights: AttentionWeights, heads: int, eps: float
) -> None:
    """Raises where the arguments do not fit together; no element is read."""
    segments.check_tensor("states", states)
    segments.check_tensor("queries", queries)
    if states.dim() != 2 or states.shape[1] == 0:
        raise ValueError(f"states has shape {list(states.shape)}; allowed: two dimensions, at least one column")
    if states.dtype not in segments.DTYPES:
        raise TypeError(f"states is {states.dtype}; allowed: {', '.join(map(str, segments.DTYPES))}")
    segments.check_offsets("offsets", offsets, states)
    if not 1 <= heads <= MOST_HEADS:
        raise ValueError(f"heads is {heads}; allowed: 1 to {MOST_HEADS}")
    if not (0 < eps < math.inf):
        raise ValueError(f"eps is {eps}; allowed: above 0")
    if queries.dim() != 3 or queries.shape[1] == 0:
        raise ValueError(f"queries has shape {list(queries.shape)}; allowed: three dimensions, at least one query")
    width, prompts, device = HEAD * heads, offsets.numel() - 1, states.device
    _check_tensor("queries", queries, (prompts, queries.shape[1], width), device)
    shapes = weight_shapes(width, states.shape[1])
    for name, given, shape in zip(_NAMES, weights, shapes, strict=True):
        _check_tensor(name, given, shape, device)


def _check_finite(name: str, values: Tensor) -> None:
    bad = (~values.isfinite()).nonzero()
    if bad.numel():
        place = ", ".join(str(int(i)) for i in bad[0])
        raise ValueError(f"{name}[{place}] is {float(values[tuple(bad[0])]):g}; allowed: finite")


def check_values(states: Tensor, offsets: Tensor, queries: Tensor, weights: AttentionWeights) -> None:
    """Raises where offsets do not ascend from 0 to T, or at the first value that is NaN or infinite; waits for it."""
    segments.check_offset_values("offsets", offsets, states.shape[0])
    _check_finite("states", states)
    _check_finite("queries", queries)
    for name, given in zip(AttentionWeights._fields, weights, strict=True):
        _check_finite(f"weights.{name}", given)
