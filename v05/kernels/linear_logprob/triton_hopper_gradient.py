"""The backward kernel for sm_90: as `triton_hopper`, and its copy engine takes the gradient away too."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.linear_logprob.triton_hopper import (
    LN2,
    LOG2_E,
    LOWEST,
    add_product,
    given_inverses,
    place_of,
    power_of_two,
)
from v05.kernels.linear_logprob.triton_kernels import halves_of


@triton.jit
def store_gradient(
    b_logit,
    bias,
    row,
    start,
    last,
    rows_of,
    out,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """p (a + b log2 p) + [j = target] c of some columns, in pieces; a, b, c are of rows, 0 where one does not count."""
    if PIECES > 1:
        half: tl.constexpr = b_logit.shape[1] // 2
        b_left, b_right = halves_of(b_logit)
        more: tl.constexpr = PIECES // 2
        store_gradient(b_left, bias, row, start, last, rows_of, out, HAS_BIAS, HAS_ENTROPY, more, INTERPRETED)
        store_gradient(b_right, bias, row, start + half, last, rows_of, out, HAS_BIAS, HAS_ENTROPY, more, INTERPRETED)
    else:
        target, base, log_sum, scale, at_power, at_log, at_target = rows_of
        width: tl.constexpr = b_logit.shape[1]
        o_column = start + tl.arange(0, width)
        if HAS_BIAS:
            b_logit += tl.load(bias + o_column, mask=o_column < last, other=0).to(tl.float32)[None, :]
        b_log = (b_logit - base[:, None]) * scale[:, None] - log_sum[:, None]
        b_power = power_of_two(b_log, INTERPRETED)
        if HAS_ENTROPY:
            b_grad = b_power * (at_power[:, None] + at_log[:, None] * tl.maximum(b_log, LOWEST))
        else:
            b_grad = b_power * at_power[:, None]
        hits = ((target >= start) & (target < start + width)).to(tl.int32)
        if tl.max(hits, axis=0) > 0:
            b_grad += tl.where(o_column[None, :] == target[:, None], at_target[:, None], 0)
        b_grad = tl.where(scale[:, None] == 0, 0, b_grad)
        out.store([row, start], b_grad.to(out.dtype))


@triton.jit(do_not_specialize=["rows", "columns", "skipped"], do_not_specialize_on_alignment=["log_sum"])
def hopper_gradient_kernel(
    hidden,
    weight,
    bias,
    targets,
    inverses,
    largest,
    log_sum,
    entropy,
    grad_logprob,
    grad_entropy,
    out,
    rows: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    temperature: tl.float64,
    skipped: tl.int64,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The gradient of `gradient_kernel`, its tiles made as those of `sums_kernel`; out is a descriptor too."""
    last = columns.to(tl.int32)
    blocks = tl.cdiv(rows.to(tl.int32), BLOCK_M)
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
            row = block * BLOCK_M
            o_row = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            m_row = o_row < rows
            row_max = tl.load(largest + o_row, mask=m_row, other=0)
            target = tl.load(targets + o_row, mask=m_row, other=skipped)
            counts = (target != skipped) & (row_max > float("-inf"))
            inverse = tl.where(counts, given_inverses(inverses, temperature, o_row, counts, PER_ROW, BLOCK_M), 0)
            by_logprob = tl.zeros([BLOCK_M], tl.float32)
            by_entropy = tl.zeros([BLOCK_M], tl.float32)
            if HAS_LOGPROB:
                by_logprob = tl.load(grad_logprob + o_row, mask=m_row, other=0)
            if HAS_ENTROPY:
                by_entropy = tl.load(grad_entropy + o_row, mask=m_row, other=0)
            own_entropy = tl.load(entropy + o_row, mask=m_row, other=0)
            own_log_sum = tl.load(log_sum + o_row, mask=m_row, other=0) * LOG2_E
            at_power = -inverse * (by_logprob + by_entropy * own_entropy)
            at_log = -inverse * by_entropy * LN2
            base = tl.where(counts, row_max, 0)
            own = (target.to(tl.int32), base, own_log_sum, inverse * LOG2_E, at_power, at_log, inverse * by_logprob)
            start = column * BLOCK_N
            store_gradient(b_logit, bias, row, start, last, own, out, HAS_BIAS, HAS_ENTROPY, PIECES, INTERPRETED)
            b_logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
