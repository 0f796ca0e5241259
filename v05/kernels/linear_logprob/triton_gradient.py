"""The backward kernel: tiles of logits made once more, of which only the gradient leaves the chip."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.linear_logprob.triton_kernels import halves_of, inverses_of, tile_of_logits


@triton.jit
def store_gradient(b_logit, bias, start, last, target, rows_of, out, HAS_BIAS: tl.constexpr, PIECES: tl.constexpr):
    """Gradient of some columns of logits, in pieces, for whose temporaries there are registers."""
    if PIECES > 1:
        half: tl.constexpr = b_logit.shape[1] // 2
        b_left, b_right = halves_of(b_logit)
        store_gradient(b_left, bias, start, last, target, rows_of, out, HAS_BIAS, PIECES // 2)
        store_gradient(b_right, bias, start + half, last, target, rows_of, out + half, HAS_BIAS, PIECES // 2)
    else:
        base, log_sum, entropy, by_logprob, by_entropy, inverse, m_row = rows_of
        o_piece = tl.arange(0, b_logit.shape[1])
        o_column = start + o_piece
        m_column = o_column < last
        if HAS_BIAS:
            b_logit += tl.load(bias + o_column, mask=m_column, other=0).to(tl.float32)[None, :]
        b_log_p = (b_logit - base[:, None]) * inverse[:, None] - log_sum[:, None]
        b_p = tl.exp(b_log_p)
        b_grad = tl.where(o_column[None, :] == target[:, None], by_logprob[:, None], 0) - by_logprob[:, None] * b_p
        b_grad -= tl.where(b_p > 0, by_entropy[:, None] * b_p * (b_log_p + entropy[:, None]), 0)
        b_grad = tl.where(inverse[:, None] == 0, 0, b_grad * inverse[:, None])
        m_out = m_row[:, None] & m_column[None, :]
        tl.store(out + o_piece[None, :], b_grad.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["rows", "columns", "skipped"], do_not_specialize_on_alignment=["log_sum"])
def gradient_kernel(
    hidden,
    weight,
    bias,
    targets,
    temperatures,
    largest,
    log_sum,
    entropy,
    grad_logprob,
    grad_entropy,
    out,
    rows: tl.int64,
    columns: tl.int64,
    features: tl.int64,
    hidden_stride: tl.int64,
    weight_stride: tl.int64,
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
    """One tile of logits as `slice_kernel` makes it, bit for bit, and of it only the gradient `[rows, columns]`.

    dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    o_row = (program % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < rows
    last = columns.to(tl.int32)
    start = ((program // blocks) * BLOCK_N).to(tl.int32)
    b_logit = tile_of_logits(
        hidden,
        weight,
        tl.minimum(o_row, rows - 1),
        tl.minimum(start + tl.arange(0, BLOCK_N), last - 1),
        features,
        hidden_stride,
        weight_stride,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        INTERPRETED,
    )
    row_max = tl.load(largest + o_row, mask=m_row, other=0)
    target = tl.load(targets + o_row, mask=m_row, other=skipped)
    counts = (target != skipped) & (row_max > float("-inf"))
    inverse = tl.where(counts, inverses_of(temperatures, temperature, o_row, counts, PER_ROW, BLOCK_M), 0)
    by_logprob = tl.zeros([BLOCK_M], tl.float32)
    by_entropy = tl.zeros([BLOCK_M], tl.float32)
    if HAS_LOGPROB:
        by_logprob = tl.load(grad_logprob + o_row, mask=m_row, other=0)
    if HAS_ENTROPY:
        by_entropy = tl.load(grad_entropy + o_row, mask=m_row, other=0)
    own_log_sum = tl.load(log_sum + o_row, mask=m_row, other=0)
    own_entropy = tl.load(entropy + o_row, mask=m_row, other=0)
    base = tl.where(counts, row_max, 0)
    rows_of = (base, own_log_sum, own_entropy, by_logprob, by_entropy, inverse, m_row)
    own = out + o_row[:, None] * columns + start
    store_gradient(b_logit, bias, start, last, target.to(tl.int32), rows_of, own, HAS_BIAS, PIECES)
