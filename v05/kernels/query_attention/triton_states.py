"""Kernels of the backward in Triton that read or write whole states."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.query_attention.triton_forward import LENGTHS


@triton.jit(do_not_specialize=LENGTHS)
def projection_backward_kernel(
    states,
    grad_kv,
    partial,
    stride: tl.int64,
    tokens: tl.int64,
    size: tl.int64,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial `[chunks, WIDTH, D]`: grad_kv' states over a chunk of tokens, for a block of columns."""
    acc: tl.constexpr = partial.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    chunk = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = o_column < size
    for head in range(HEADS):
        b_first = tl.zeros([BLOCK_T, BLOCK_D], acc)
        b_second = tl.zeros([BLOCK_T, BLOCK_D], acc)
        for start in range(0, CHUNK, BLOCK_T):
            o_token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
            m_token = o_token < tokens
            mask = m_token[:, None] & m_column[None, :]
            b_x = tl.load(states + o_token[:, None] * stride + o_column[None, :], mask=mask, other=0).to(acc)
            b_first += b_x * tl.load(grad_kv + o_token * WIDTH + 2 * head, mask=m_token, other=0)[:, None]
            b_second += b_x * tl.load(grad_kv + o_token * WIDTH + 2 * head + 1, mask=m_token, other=0)[:, None]
        out = partial + (chunk * WIDTH + 2 * head) * size + o_column
        tl.store(out, tl.sum(b_first, axis=0), mask=m_column)
        tl.store(out + size, tl.sum(b_second, axis=0), mask=m_column)


@triton.jit(do_not_specialize=LENGTHS)
def states_kernel(
    grad_kv,
    projection,
    grad_states,
    tokens: tl.int64,
    size: tl.int64,
    HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of a block of states: grad_kv projection."""
    acc: tl.constexpr = grad_kv.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_token = o_token < tokens
    m_column = o_column < size
    b_sum = tl.zeros([BLOCK_T, BLOCK_D], acc)
    for e in range(WIDTH):
        b_weight = tl.load(projection + e * size + o_column, mask=m_column, other=0)
        b_sum += tl.load(grad_kv + o_token * WIDTH + e, mask=m_token, other=0)[:, None] * b_weight[None, :]
    mask = m_token[:, None] & m_column[None, :]
    out = grad_states + o_token[:, None] * size + o_column[None, :]
    tl.store(out, b_sum.to(grad_states.dtype.element_ty), mask=mask)
