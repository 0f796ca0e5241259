"""The forward kernel for sm_90: its copy engine brings the operands, and a program takes many tiles, so that the loads
of a tile begin before the one before it is finished."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.linear_logprob.triton_kernels import LENGTHS, halves_of, inverses_of
from v05.kernels.token_logprob.triton import LOG2_E

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e4)  # its power of two is 0, and 0 times it is 0, not NaN
GROUP = tl.constexpr(16)  # blocks of rows that go through all columns together, and so find the weight in the cache


@triton.jit
def power_of_two(x, INTERPRETED: tl.constexpr):
    """2^x in one instruction, 0 below the smallest normal number."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def given_inverses(inverses, temperature, o_row, m_row, PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / temperature of rows; those of rows come divided already, for which there are no registers here."""
    if PER_ROW:
        return tl.load(inverses + o_row, mask=m_row, other=0)
    return inverses_of(inverses, temperature, o_row, m_row, False, BLOCK_M)


@triton.jit
def place_of(index, blocks, wide):
    """Block of rows and block of columns of a tile."""
    per_group = GROUP * wide
    first = (index // per_group) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    within = index % per_group
    return first + within % height, within // height


@triton.jit
def add_product(b_logit, hidden, weight, row, column, start, INTERPRETED: tl.constexpr):
    """A tile of logits, some features further; outside of a matrix there are zeros."""
    b_left = hidden.load([row, start])
    b_right = weight.load([column, start])
    if INTERPRETED:  # which multiplies bfloat16 as if its bits were integers
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right.T, b_logit)


@triton.jit
def add_piece(b_logit, bias, start, last, target, scale, sums, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The four sums of rows, some columns of logits further, in powers of two: scale is log2(e) / temperature."""
    row_max, total, weighted, own = sums
    o_column = start + tl.arange(0, b_logit.shape[1])
    if HAS_BIAS:
        b_logit += tl.load(bias + o_column, mask=o_column < last, other=0).to(tl.float32)[None, :]
    own += tl.sum(tl.where(o_column[None, :] == target[:, None], b_logit, 0), axis=1)
    b_logit = tl.where((o_column < last)[None, :], b_logit, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_logit, axis=1))
    base = tl.where(new_max > float("-inf"), new_max, 0)
    shift = tl.where(row_max > float("-inf"), (row_max - base) * scale, 0)
    factor = power_of_two(shift, INTERPRETED)
    b_gap = (b_logit - base[:, None]) * scale[:, None]
    b_power = power_of_two(b_gap, INTERPRETED)
    weighted = tl.where(factor > 0, (weighted + total * shift) * factor, 0)
    weighted += tl.sum(b_power * tl.maximum(b_gap, LOWEST), axis=1)
    total = total * factor + tl.sum(b_power, axis=1)
    return new_max, total, weighted, own


@triton.jit
def add_tile(
    b_logit,
    bias,
    start,
    last,
    target,
    scale,
    sums,
    HAS_BIAS: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same for a tile, in pieces, for whose temporaries there are registers."""
    if PIECES == 1:
        sums = add_piece(b_logit, bias, start, last, target, scale, sums, HAS_BIAS, INTERPRETED)
    else:
        half: tl.constexpr = b_logit.shape[1] // 2
        b_left, b_right = halves_of(b_logit)
        sums = add_tile(b_left, bias, start, last, target, scale, sums, HAS_BIAS, PIECES // 2, INTERPRETED)
        sums = add_tile(b_right, bias, start + half, last, target, scale, sums, HAS_BIAS, PIECES // 2, INTERPRETED)
    return sums


@triton.jit(do_not_specialize=LENGTHS)
def sums_kernel(
    hidden,
    weight,
    bias,
    targets,
    inverses,
    order,
    kept,
    partial,
    chosen,
    rows: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    temperature: tl.float64,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What `slice_kernel` leaves, of slices one tile wide: a program takes every n-th tile.

    hidden and weight are descriptors; rows of hidden are in `order` already, those that count first. One loop goes
    through the features of all tiles of a program: two, one in the other, would wait at each tile for its loads.
    """
    last = columns.to(tl.int32)
    count = tl.load(kept).to(tl.int32)
    blocks = tl.cdiv(count, BLOCK_M)
    wide = tl.cdiv(last, BLOCK_N)
    programs = tl.num_programs(0)
    steps = tl.cdiv(features.to(tl.int32), BLOCK_K)
    mine = tl.cdiv(blocks * wide - tl.program_id(0), programs)
    index = tl.program_id(0) - programs
    step = -1
    block = 0
    column = 0
    b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, mine * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            index += programs
            block, column = place_of(index, blocks, wide)
        b_logit = add_product(b_logit, hidden, weight, block * BLOCK_M, column * BLOCK_N, step * BLOCK_K, INTERPRETED)
        if step == steps - 1:
            start = column * BLOCK_N
            o_place = block * BLOCK_M + tl.arange(0, BLOCK_M)
            m_row = o_place < count
            o_row = tl.load(order + o_place, mask=m_row, other=0).to(tl.int32)
            target = tl.load(targets + o_row, mask=m_row, other=-1).to(tl.int32)
            scale = given_inverses(inverses, temperature, o_row, m_row, PER_ROW, BLOCK_M) * LOG2_E
            none = tl.zeros([BLOCK_M], tl.float32)
            sums = (none + float("-inf"), none, none, none)
            sums = add_tile(b_logit, bias, start, last, target, scale, sums, HAS_BIAS, PIECES, INTERPRETED)
            row_max, total, weighted, own = sums
            fields = partial + column * (3 * rows) + o_row
            tl.store(fields, row_max, mask=m_row)
            tl.store(fields + rows, total, mask=m_row)
            tl.store(fields + 2 * rows, weighted * LN2, mask=m_row)
            m_own = m_row & (target >= start) & (target < tl.minimum(start + BLOCK_N, last))
            tl.store(chosen + o_row, own, mask=m_own)
            b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
