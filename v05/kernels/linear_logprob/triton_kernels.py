"""The forward kernels: tiles of logits that never leave the chip, and the putting together of what they leave."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.token_logprob.triton import inverse_temperature_of

# A new number of rows or columns compiles nothing; of features and strides, which a model fixes, it counts only whether
# they are multiples of 16, for then loads are wide.
LENGTHS = ["rows", "columns"]


@triton.jit
def tile_of_logits(
    hidden,
    weight,
    o_row,
    o_column,
    features,
    hidden_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Products `[BLOCK_M, BLOCK_N]` of rows of hidden with rows of weight, summed up in float32."""
    b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    o_feature = tl.arange(0, BLOCK_K)
    left = hidden + o_row[:, None] * hidden_stride + o_feature[None, :]
    right = weight + o_column[None, :].to(tl.int64) * weight_stride + o_feature[:, None]
    for start in range(0, features.to(tl.int32), BLOCK_K):
        m_feature = o_feature < features.to(tl.int32) - start
        b_left = tl.load(left + start, mask=m_feature[None, :], other=0)
        b_right = tl.load(right + start, mask=m_feature[:, None], other=0)
        if INTERPRETED:  # which multiplies bfloat16 as if its bits were integers
            b_left = b_left.to(tl.float32)
            b_right = b_right.to(tl.float32)
        b_logit = tl.dot(b_left, b_right, b_logit, input_precision="ieee")
    return b_logit


@triton.jit
def inverses_of(temperatures, temperature, o_row, m_row, PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / temperature of rows."""
    if PER_ROW:
        return (1.0 / tl.load(temperatures + o_row, mask=m_row, other=1)).to(tl.float32)
    one = inverse_temperature_of(temperatures, temperature, 0, 0, tl.float32)
    return tl.zeros([BLOCK_M], tl.float32) + one


@triton.jit
def halves_of(b_tile):
    """The left and the right half of the columns of a tile, in the registers where they are."""
    rows: tl.constexpr = b_tile.shape[0]
    half: tl.constexpr = b_tile.shape[1] // 2
    return b_tile.reshape(rows, 2, half).permute(0, 2, 1).split()


@triton.jit
def add_piece(b_logit, bias, start, last, target, inverse, sums, HAS_BIAS: tl.constexpr):
    """The four sums of rows, some columns of logits further."""
    row_max, total, weighted, own = sums
    o_column = start + tl.arange(0, b_logit.shape[1])
    m_column = o_column < last
    if HAS_BIAS:
        b_logit += tl.load(bias + o_column, mask=m_column, other=0).to(tl.float32)[None, :]
    own += tl.sum(tl.where(o_column[None, :] == target[:, None], b_logit, 0), axis=1)
    b_logit = tl.where(m_column[None, :], b_logit, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_logit, axis=1))
    base = tl.where(new_max > float("-inf"), new_max, 0)
    shift = tl.where(row_max > float("-inf"), (row_max - base) * inverse, 0)
    factor = tl.exp(shift)
    b_gap = (b_logit - base[:, None]) * inverse[:, None]
    b_power = tl.exp(b_gap)
    weighted = tl.where(factor > 0, (weighted + total * shift) * factor, 0)
    weighted += tl.sum(tl.where(b_power > 0, b_power * b_gap, 0), axis=1)
    total = total * factor + tl.sum(b_power, axis=1)
    return new_max, total, weighted, own


@triton.jit
def add_tile(b_logit, bias, start, last, target, inverse, sums, HAS_BIAS: tl.constexpr, PIECES: tl.constexpr):
    """The same for a tile, in pieces, for whose temporaries there are registers."""
    if PIECES == 1:
        sums = add_piece(b_logit, bias, start, last, target, inverse, sums, HAS_BIAS)
    else:
        half: tl.constexpr = b_logit.shape[1] // 2
        b_left, b_right = halves_of(b_logit)
        sums = add_tile(b_left, bias, start, last, target, inverse, sums, HAS_BIAS, PIECES // 2)
        sums = add_tile(b_right, bias, start + half, last, target, inverse, sums, HAS_BIAS, PIECES // 2)
    return sums


@triton.jit(do_not_specialize=LENGTHS)
def slice_kernel(
    hidden,
    weight,
    bias,
    targets,
    temperatures,
    order,
    kept,
    partial,
    chosen,
    rows: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
    temperature: tl.float64,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Largest logit, sum and weighted sum of a block of rows over one slice of the vocabulary, and its targets' logits.

    Rows that count come first in `order`; a block past them does nothing. Programs that follow each other share a slice
    of the weight, which so stays in the cache.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    split = program // blocks
    o_place = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(kept)
    if (program % blocks) * BLOCK_M < count:
        m_row = o_place < count
        o_row = tl.load(order + o_place, mask=m_row, other=0)
        target = tl.load(targets + o_row, mask=m_row, other=-1).to(tl.int32)
        inverse = inverses_of(temperatures, temperature, o_row, m_row, PER_ROW, BLOCK_M)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        weighted = tl.zeros([BLOCK_M], tl.float32)
        own = tl.zeros([BLOCK_M], tl.float32)
        sums = (row_max, total, weighted, own)
        first = (split * SPLIT).to(tl.int32)  # no vocabulary has 2^31 tokens, and half the registers hold a column
        last = tl.minimum(first + SPLIT, columns.to(tl.int32))
        for start in range(first, last, BLOCK_N):
            b_logit = tile_of_logits(
                hidden,
                weight,
                o_row,
                tl.minimum(start + tl.arange(0, BLOCK_N), last - 1),  # past the slice, its last column once more
                features,
                hidden_stride,
                weight_stride,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                INTERPRETED,
            )
            sums = add_tile(b_logit, bias, start, last, target, inverse, sums, HAS_BIAS, PIECES)
        row_max, total, weighted, own = sums
        fields = partial + split * 3 * rows + o_row
        tl.store(fields, row_max, mask=m_row)
        tl.store(fields + rows, total, mask=m_row)
        tl.store(fields + 2 * rows, weighted, mask=m_row)
        tl.store(chosen + o_row, own, mask=m_row & (target >= first) & (target < last))


@triton.jit(do_not_specialize=["rows", "splits", "skipped"])
def join_kernel(
    targets,
    temperatures,
    partial,
    joined,
    rows: tl.int64,
    splits: tl.int64,
    temperature: tl.float64,
    skipped: tl.int64,
    PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Largest logit, log of the sum and entropy of a block of rows, BLOCK_S slices at a time, in their order."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    m_kept = m_row & (tl.load(targets + o_row, mask=m_row, other=skipped) != skipped)
    inverse = inverses_of(temperatures, temperature, o_row, m_kept, PER_ROW, BLOCK_M)
    o_split = tl.arange(0, BLOCK_S)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        m_own = ((first + o_split) < splits)[:, None] & m_kept[None, :]
        fields = partial + (first + o_split)[:, None] * 3 * rows + o_row[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(fields, mask=m_own, other=float("-inf")), axis=0))
    base = tl.where(largest > float("-inf"), largest, 0)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, splits, BLOCK_S):
        m_own = ((first + o_split) < splits)[:, None] & m_kept[None, :]
        fields = partial + (first + o_split)[:, None] * 3 * rows + o_row[None, :]
        own = tl.load(fields, mask=m_own, other=float("-inf"))
        own_sum = tl.load(fields + rows, mask=m_own, other=0)
        own_weighted = tl.load(fields + 2 * rows, mask=m_own, other=0)
        shift = tl.where(own > float("-inf"), (own - base[None, :]) * inverse[None, :], 0)
        factor = tl.exp(shift)
        weighted += tl.sum(tl.where(factor > 0, (own_weighted + own_sum * shift) * factor, 0), axis=0)
        total += tl.sum(own_sum * factor, axis=0)
    some = (largest > float("-inf")) | (total != total)
    log_total = tl.where(some, tl.log(tl.where(some, total, 1)), 0)
    entropy = log_total - weighted / tl.where(some, total, 1)
    tl.store(joined + o_row, largest, mask=m_row)
    tl.store(joined + rows + o_row, log_total, mask=m_row)
    tl.store(joined + 2 * rows + o_row, tl.where(some & ~(entropy < 0), entropy, 0), mask=m_row)
