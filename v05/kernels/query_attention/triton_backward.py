"""Kernels of the backward in Triton: a block of queries over its tokens, then a block of tokens over its queries.

Weights get their gradients from sums by block, which are added up afterwards in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.query_attention.triton_forward import LENGTHS, SCALE
from v05.kernels.query_attention.triton_rows import (
    affine_queries,
    as_column,
    column,
    in_own_lanes,
    load_rows,
    load_vector,
    normalised,
    normalised_backward,
    product,
    product_backward,
    store_rows,
    store_sums,
)
from v05.kernels.shrinkage.triton import scalar


@triton.jit
def slopes_of_queries(
    keys,
    values,
    q0,
    q1,
    g0,
    g1,
    delta,
    largest,
    begin,
    end,
    tokens,
    acc: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sum over tokens of p (g v - delta) k, for both numbers of the key."""
    b_first = tl.zeros([BLOCK_Q, BLOCK_T], acc)
    b_second = tl.zeros([BLOCK_Q, BLOCK_T], acc)
    for start in range(begin, end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        m_token = o_token < end
        k0 = tl.load(keys + o_token, mask=m_token, other=0)
        k1 = tl.load(keys + tokens + o_token, mask=m_token, other=0)
        v0 = tl.load(values + o_token, mask=m_token, other=0)
        v1 = tl.load(values + tokens + o_token, mask=m_token, other=0)
        b_score = q0[:, None] * k0[None, :] + q1[:, None] * k1[None, :] - largest[:, None]
        b_power = tl.where(m_token[None, :], tl.exp(b_score), 0)
        b_slope = b_power * (g0[:, None] * v0[None, :] + g1[:, None] * v1[None, :] - delta[:, None])
        b_first += b_slope * k0[None, :]
        b_second += b_slope * k1[None, :]
    return tl.sum(b_first, axis=1), tl.sum(b_second, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def queries_kernel(
    keys,
    offsets,
    queries,
    attended,
    largest,
    inverse,
    grad_features,
    rows,
    grad_queries,
    sums,
    query_norm,
    query_norm_bias,
    in_weight,
    in_bias,
    out_weight,
    tokens: tl.int64,
    prompts: tl.int64,
    count: tl.int64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A block of queries: their gradients, sums by block, and rows `[5, B, HEADS, Q]` for the pass over tokens.

    Rows: the scaled query's two numbers; the gradient by what it attended, two too, and its product with that, these
    three over the sum of powers. Sums `[2, WIDTH, PADDED]`: of the output projection, and of that of the queries.
    """
    acc: tl.constexpr = rows.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    prompt = tl.program_id(0).to(tl.int64)
    o_query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < count
    o_row = prompt * count + o_query
    o_e = tl.arange(0, PADDED)
    eps = scalar(eps, acc)
    b_hat, b_affine, scale = affine_queries(queries, query_norm, query_norm_bias, o_row, m_query, o_e, eps, WIDTH)
    b_grad = load_rows(grad_features, o_row, m_query, o_e, WIDTH)
    b_by_attended = product_backward(b_grad, out_weight, o_e, WIDTH)
    o_attended = (prompt * WIDTH + o_e[None, :]) * count + o_query[:, None]
    m_attended = m_query[:, None] & (o_e < WIDTH)[None, :]
    b_attended = tl.load(attended + o_attended, mask=m_attended, other=0)
    sums += (prompt * tl.num_programs(1) + tl.program_id(1)) * 2 * WIDTH * PADDED
    store_sums(sums, b_grad, b_attended, o_e, WIDTH, PADDED)
    begin = tl.load(offsets + prompt)
    end = tl.load(offsets + prompt + 1)
    all_rows = prompts * HEADS * count
    b_by_q = tl.zeros([BLOCK_Q, PADDED], acc)
    for head in range(HEADS):
        o_statistic = (prompt * HEADS + head) * count + o_query
        over = tl.load(inverse + o_statistic, mask=m_query, other=0)
        most = tl.load(largest + o_statistic, mask=m_query, other=0)
        q0 = tl.where(m_query, product(b_affine, in_weight, in_bias, 2 * head, o_e, WIDTH) * SCALE, 0)
        q1 = tl.where(m_query, product(b_affine, in_weight, in_bias, 2 * head + 1, o_e, WIDTH) * SCALE, 0)
        g0 = column(b_by_attended, o_e, 2 * head) * over
        g1 = column(b_by_attended, o_e, 2 * head + 1) * over
        own_attended = attended + (prompt * WIDTH + 2 * head) * count + o_query
        delta = g0 * tl.load(own_attended, mask=m_query, other=0)
        delta += g1 * tl.load(own_attended + count, mask=m_query, other=0)
        tl.store(rows + o_statistic, q0, mask=m_query)
        tl.store(rows + all_rows + o_statistic, q1, mask=m_query)
        tl.store(rows + 2 * all_rows + o_statistic, g0, mask=m_query)
        tl.store(rows + 3 * all_rows + o_statistic, g1, mask=m_query)
        tl.store(rows + 4 * all_rows + o_statistic, delta, mask=m_query)
        own_keys = keys + 2 * head * tokens
        own_values = own_keys + WIDTH * tokens
        first, second = slopes_of_queries(
            own_keys, own_values, q0, q1, g0, g1, delta, most, begin, end, tokens, acc, BLOCK_Q, BLOCK_T
        )
        b_by_q += as_column(first * SCALE, o_e, 2 * head) + as_column(second * SCALE, o_e, 2 * head + 1)
    b_by_q = tl.where(m_query[:, None], b_by_q, 0)
    store_sums(sums + WIDTH * PADDED, b_by_q, b_hat, o_e, WIDTH, PADDED)
    b_by_hat = product_backward(b_by_q, in_weight, o_e, WIDTH) * load_vector(query_norm, o_e, WIDTH)
    store_rows(grad_queries, normalised_backward(b_by_hat, b_hat, scale, o_e, WIDTH), o_row, m_query, o_e, WIDTH)


@triton.jit
def prompt_of(offsets, prompts, block, BLOCK_T: tl.constexpr):
    """The prompt that a block of tokens lies in, prompt b having those from offsets[b] // BLOCK_T + b on."""
    low = block * 0
    high = prompts - 1
    while low < high:
        middle = (low + high + 1) // 2
        after = tl.load(offsets + middle) // BLOCK_T + middle <= block
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle - 1)
    return low


@triton.jit
def slopes_of_tokens(
    rows, largest, all_rows, k0, k1, v0, v1, count, acc: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Over a prompt's queries: sums of p (g v - delta) q and of p g, two numbers each."""
    b_k0 = tl.zeros([BLOCK_T, BLOCK_Q], acc)
    b_k1 = tl.zeros([BLOCK_T, BLOCK_Q], acc)
    b_v0 = tl.zeros([BLOCK_T, BLOCK_Q], acc)
    b_v1 = tl.zeros([BLOCK_T, BLOCK_Q], acc)
    for start in range(0, count, BLOCK_Q):
        o_query = start + tl.arange(0, BLOCK_Q)
        m_query = o_query < count
        q0 = tl.load(rows + o_query, mask=m_query, other=0)[None, :]
        q1 = tl.load(rows + all_rows + o_query, mask=m_query, other=0)[None, :]
        g0 = tl.load(rows + 2 * all_rows + o_query, mask=m_query, other=0)[None, :]
        g1 = tl.load(rows + 3 * all_rows + o_query, mask=m_query, other=0)[None, :]
        delta = tl.load(rows + 4 * all_rows + o_query, mask=m_query, other=0)[None, :]
        most = tl.load(largest + o_query, mask=m_query, other=0)[None, :]
        b_power = tl.exp(q0 * k0[:, None] + q1 * k1[:, None] - most)
        b_slope = b_power * (g0 * v0[:, None] + g1 * v1[:, None] - delta)
        b_k0 += b_slope * q0
        b_k1 += b_slope * q1
        b_v0 += b_power * g0
        b_v1 += b_power * g1
    return tl.sum(b_k0, axis=1), tl.sum(b_k1, axis=1), tl.sum(b_v0, axis=1), tl.sum(b_v1, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def tokens_backward_kernel(
    kv,
    keys,
    offsets,
    rows,
    largest,
    grad_kv,
    sums,
    key_norm,
    in_weight,
    tokens: tl.int64,
    prompts: tl.int64,
    count: tl.int64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A block of one prompt's tokens: the gradient by kv, and sums `[3, WIDTH, PADDED]` of keys, values and bias."""
    acc: tl.constexpr = kv.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    program = tl.program_id(0).to(tl.int64)
    prompt = prompt_of(offsets, prompts, program, BLOCK_T)
    begin = tl.load(offsets + prompt)
    end = tl.load(offsets + prompt + 1)
    o_token = begin + (program - begin // BLOCK_T - prompt) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < end
    own_count = tl.where(tl.sum(m_token.to(tl.int32), axis=0) > 0, count, 0)
    o_e = tl.arange(0, PADDED)
    all_rows = prompts * HEADS * count
    o_repeated = tl.arange(0, BLOCK_T * PADDED) % PADDED
    b_by_k = tl.zeros([BLOCK_T, BLOCK_T * PADDED], acc)
    b_by_v = tl.zeros([BLOCK_T, BLOCK_T * PADDED], acc)
    for head in range(HEADS):
        k0 = tl.load(keys + 2 * head * tokens + o_token, mask=m_token, other=0)
        k1 = tl.load(keys + (2 * head + 1) * tokens + o_token, mask=m_token, other=0)
        v0 = tl.load(keys + (WIDTH + 2 * head) * tokens + o_token, mask=m_token, other=0)
        v1 = tl.load(keys + (WIDTH + 2 * head + 1) * tokens + o_token, mask=m_token, other=0)
        own = (prompt * HEADS + head) * count
        by_k0, by_k1, by_v0, by_v1 = slopes_of_tokens(
            rows + own, largest + own, all_rows, k0, k1, v0, v1, own_count, acc, BLOCK_T, BLOCK_Q
        )
        b_by_k += as_column(by_k0, o_repeated, 2 * head) + as_column(by_k1, o_repeated, 2 * head + 1)
        b_by_v += as_column(by_v0, o_repeated, 2 * head) + as_column(by_v1, o_repeated, 2 * head + 1)
    b_by_k = tl.where(m_token[:, None], in_own_lanes(b_by_k, BLOCK_T, PADDED), 0)
    b_by_v = tl.where(m_token[:, None], in_own_lanes(b_by_v, BLOCK_T, PADDED), 0)
    b_kv = load_rows(kv, o_token, m_token, o_e, WIDTH)
    b_hat, scale = normalised(b_kv, o_e, scalar(eps, acc), WIDTH)
    square: tl.constexpr = WIDTH * WIDTH
    b_by_hat = product_backward(b_by_k, in_weight + square, o_e, WIDTH) * load_vector(key_norm, o_e, WIDTH)
    b_by_kv = normalised_backward(b_by_hat, b_hat, scale, o_e, WIDTH)
    b_by_kv += product_backward(b_by_v, in_weight + 2 * square, o_e, WIDTH)
    store_rows(grad_kv, b_by_kv, o_token, m_token, o_e, WIDTH)
    sums += program * 3 * WIDTH * PADDED
    store_sums(sums, b_by_k, b_hat, o_e, WIDTH, PADDED)
    store_sums(sums + WIDTH * PADDED, b_by_v, b_kv, o_e, WIDTH, PADDED)
    store_sums(sums + 2 * WIDTH * PADDED, b_by_kv, tl.zeros_like(b_kv), o_e, WIDTH, PADDED)
