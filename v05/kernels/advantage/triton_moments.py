"""Mean and std of a batch of rewards in Triton: one launch, and one more over its parts in a large batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels import segments
from v05.kernels.device import on_device_of

BLOCK = 8192  # rewards of a program
WARPS = 16


@triton.jit
def load_weighted(values, weights, start, end, first, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses, mask, values less the first, and weights of start to start + BLOCK, in float64."""
    o = start + tl.arange(0, BLOCK)
    mask = o < end
    b_value = tl.load(values + o, mask=mask, other=0).to(tl.float64)
    b_weight = tl.where(mask, 1.0, 0.0).to(tl.float64)
    if WEIGHTED:
        b_weight = tl.load(weights + o, mask=mask, other=0).to(tl.float64)
    return o, mask, tl.where(mask, b_value - first, 0), b_weight


@triton.jit
def pooled(values, weights, squares, begin, end, WEIGHTED: tl.constexpr, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """Weight, mean, and squares about it; shifted by the first value, so that equal ones have squares of exactly 0."""
    first = tl.load(values + begin).to(tl.float64)
    weight = tl.full([], 0, tl.float64)
    shifted = tl.full([], 0, tl.float64)
    total = tl.full([], 0, tl.float64)
    for start in range(begin, end, BLOCK):
        _o, _mask, b_value, b_weight = load_weighted(values, weights, start, end, first, WEIGHTED, BLOCK)
        weight += tl.sum(b_weight)
        shifted += tl.sum(b_weight * b_value)
    mean = first + shifted / tl.where(weight > 0, weight, 1)
    for start in range(begin, end, BLOCK):
        o, mask, b_value, b_weight = load_weighted(values, weights, start, end, mean, WEIGHTED, BLOCK)
        total += tl.sum(b_weight * b_value * b_value)
        if SQUARED:
            total += tl.sum(tl.load(squares + o, mask=mask, other=0))
    return weight, mean, total


@triton.jit(do_not_specialize=["n", "parts"])
def moments_kernel(
    rewards,
    lengths,
    partial,
    moments,
    n: tl.int64,
    parts: tl.int64,
    eps: tl.float64,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pools BLOCK rewards a program into partial [3, programs]; where there are parts already, pools those instead.

    A program alone stores the moments, mean and std + eps. One kernel for both, so that a first large batch compiles
    nothing.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    if parts > 0:
        weight, mean, squares = pooled(partial + parts, partial, partial + 2 * parts, 0, parts, True, True, BLOCK)
    else:
        begin = program * BLOCK
        end = tl.minimum(begin + BLOCK, n)
        weight, mean, squares = pooled(rewards, lengths, rewards, begin, end, WEIGHTED, False, BLOCK)
    if programs == 1:
        acc: tl.constexpr = moments.dtype.element_ty
        degrees = weight - 1
        std = tl.sqrt(squares / tl.where(degrees < 1, 1, degrees)) + eps
        tl.store(moments, mean.to(acc))
        tl.store(moments + 1, tl.where((degrees <= 0) | (squares <= 0), 1, std).to(acc))
    else:
        tl.store(partial + program, weight)
        tl.store(partial + programs + program, mean)
        tl.store(partial + 2 * programs + program, squares)


def batch_moments(rewards: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    """The reference's mean and std + eps `[2]` of contiguous rewards, at least one, summed in float64."""
    n = rewards.numel()
    programs = triton.cdiv(n, BLOCK)
    moments = rewards.new_empty(2, dtype=segments.working_dtype(rewards))
    partial = rewards.new_empty(3, programs, dtype=torch.float64)
    given = (rewards, rewards if lengths is None else lengths.contiguous(), partial, moments, n)
    options = {"WEIGHTED": lengths is not None, "BLOCK": BLOCK, "num_warps": WARPS}
    with on_device_of(rewards):
        moments_kernel[(programs,)](*given, 0, eps, **options)
        if programs > 1:
            moments_kernel[(1,)](*given, programs, eps, **options)
    return moments
