"""Kernels of the forward in Triton: tokens become keys and values once, then a block of queries reads its prompt's.

Sums over tokens stay in their lanes until the last token, so nothing crosses lanes inside a loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.query_attention.rules import HEAD
from v05.kernels.query_attention.triton_rows import (
    affine_queries,
    as_column,
    in_own_lanes,
    load_rows,
    load_vector,
    product,
    store_keys,
    store_rows,
)
from v05.kernels.shrinkage.triton import scalar

SCALE = tl.constexpr(HEAD**-0.5)
# A new length compiles nothing.
LENGTHS = ["stride", "tokens", "size", "prompts", "count"]


@triton.jit
def project(
    states,
    weight,
    o_token,
    m_token,
    stride,
    size,
    acc: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """states weight' of a block of tokens, head by head: the states come from the cache after the first."""
    o_repeated = tl.arange(0, BLOCK_T * PADDED) % PADDED
    b_kv = tl.zeros([BLOCK_T, BLOCK_T * PADDED], acc)
    for head in range(HEADS):
        b_first = tl.zeros([BLOCK_T, BLOCK_D], acc)
        b_second = tl.zeros([BLOCK_T, BLOCK_D], acc)
        for start in range(0, size, BLOCK_D):
            o_column = start + tl.arange(0, BLOCK_D)
            m_column = o_column < size
            mask = m_token[:, None] & m_column[None, :]
            b_x = tl.load(states + o_token[:, None] * stride + o_column[None, :], mask=mask, other=0).to(acc)
            b_first += b_x * tl.load(weight + 2 * head * size + o_column, mask=m_column, other=0)[None, :]
            b_second += b_x * tl.load(weight + (2 * head + 1) * size + o_column, mask=m_column, other=0)[None, :]
        b_kv += as_column(tl.sum(b_first, axis=1), o_repeated, 2 * head)
        b_kv += as_column(tl.sum(b_second, axis=1), o_repeated, 2 * head + 1)
    return in_own_lanes(b_kv, BLOCK_T, PADDED)


@triton.jit(do_not_specialize=LENGTHS)
def tokens_kernel(
    states,
    kv,
    keys,
    projection,
    projection_bias,
    key_norm,
    key_norm_bias,
    in_weight,
    in_bias,
    stride: tl.int64,
    tokens: tl.int64,
    size: tl.int64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Projected states kv `[T, E]`, keys and values of a block of tokens."""
    acc: tl.constexpr = kv.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < tokens
    o_e = tl.arange(0, PADDED)
    b_kv = project(states, projection, o_token, m_token, stride, size, acc, HEADS, PADDED, BLOCK_T, BLOCK_D)
    b_kv += load_vector(projection_bias, o_e, WIDTH)
    store_rows(kv, b_kv, o_token, m_token, o_e, WIDTH)
    eps = scalar(eps, acc)
    store_keys(keys, b_kv, in_weight, in_bias, key_norm, key_norm_bias, o_token, m_token, tokens, o_e, eps, WIDTH)


@triton.jit(do_not_specialize=LENGTHS)
def keys_kernel(
    kv,
    keys,
    key_norm,
    key_norm_bias,
    in_weight,
    in_bias,
    tokens: tl.int64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Keys and values of a block of tokens, once more."""
    WIDTH: tl.constexpr = 2 * HEADS
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < tokens
    o_e = tl.arange(0, PADDED)
    b_kv = load_rows(kv, o_token, m_token, o_e, WIDTH)
    eps = scalar(eps, kv.dtype.element_ty)
    store_keys(keys, b_kv, in_weight, in_bias, key_norm, key_norm_bias, o_token, m_token, tokens, o_e, eps, WIDTH)


@triton.jit
def largest_score(keys, q0, q1, begin, end, tokens, acc: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr):
    """The largest score of each query; 0 without tokens."""
    b_most = tl.full([BLOCK_Q, BLOCK_T], float("-inf"), acc)
    for start in range(begin, end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        m_token = o_token < end
        k0 = tl.load(keys + o_token, mask=m_token, other=0)
        k1 = tl.load(keys + tokens + o_token, mask=m_token, other=0)
        b_score = q0[:, None] * k0[None, :] + q1[:, None] * k1[None, :]
        b_most = tl.maximum(b_most, tl.where(m_token[None, :], b_score, float("-inf")))
    return tl.where(end > begin, tl.max(b_most, axis=1), 0)


@triton.jit
def attend(
    keys, values, q0, q1, largest, begin, end, tokens, acc: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Sum of powers relative to the largest score, and of powers times the two values."""
    b_sum = tl.zeros([BLOCK_Q, BLOCK_T], acc)
    b_first = tl.zeros([BLOCK_Q, BLOCK_T], acc)
    b_second = tl.zeros([BLOCK_Q, BLOCK_T], acc)
    for start in range(begin, end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        m_token = o_token < end
        k0 = tl.load(keys + o_token, mask=m_token, other=0)
        k1 = tl.load(keys + tokens + o_token, mask=m_token, other=0)
        v0 = tl.load(values + o_token, mask=m_token, other=0)
        v1 = tl.load(values + tokens + o_token, mask=m_token, other=0)
        b_score = q0[:, None] * k0[None, :] + q1[:, None] * k1[None, :]
        b_power = tl.where(m_token[None, :], tl.exp(b_score - largest[:, None]), 0)
        b_sum += b_power
        b_first += b_power * v0[None, :]
        b_second += b_power * v1[None, :]
    return tl.sum(b_sum, axis=1), tl.sum(b_first, axis=1), tl.sum(b_second, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    keys,
    offsets,
    queries,
    features,
    attended,
    largest,
    inverse,
    query_norm,
    query_norm_bias,
    in_weight,
    in_bias,
    out_weight,
    out_bias,
    tokens: tl.int64,
    count: tl.int64,
    eps: tl.float64,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """All heads of a block of one prompt's queries, the output projection included."""
    acc: tl.constexpr = features.dtype.element_ty
    WIDTH: tl.constexpr = 2 * HEADS
    prompt = tl.program_id(0).to(tl.int64)
    o_query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < count
    o_row = prompt * count + o_query
    o_e = tl.arange(0, PADDED)
    eps = scalar(eps, acc)
    _b_hat, b_affine, _scale = affine_queries(queries, query_norm, query_norm_bias, o_row, m_query, o_e, eps, WIDTH)
    begin = tl.load(offsets + prompt)
    end = tl.load(offsets + prompt + 1)
    b_out = tl.zeros([BLOCK_Q, PADDED], acc) + load_vector(out_bias, o_e, WIDTH)
    for head in range(HEADS):
        q0 = product(b_affine, in_weight, in_bias, 2 * head, o_e, WIDTH) * SCALE
        q1 = product(b_affine, in_weight, in_bias, 2 * head + 1, o_e, WIDTH) * SCALE
        own_keys = keys + 2 * head * tokens
        most = largest_score(own_keys, q0, q1, begin, end, tokens, acc, BLOCK_Q, BLOCK_T)
        own_values = own_keys + WIDTH * tokens
        total, first, second = attend(own_keys, own_values, q0, q1, most, begin, end, tokens, acc, BLOCK_Q, BLOCK_T)
        over = tl.where(total == 0, 0, 1 / tl.where(total == 0, 1, total))
        first *= over
        second *= over
        o_statistic = (prompt * HEADS + head) * count + o_query
        tl.store(largest + o_statistic, most, mask=m_query)
        tl.store(inverse + o_statistic, over, mask=m_query)
        o_attended = (prompt * WIDTH + 2 * head) * count + o_query
        tl.store(attended + o_attended, first, mask=m_query)
        tl.store(attended + o_attended + count, second, mask=m_query)
        m_e = o_e < WIDTH
        b_out += first[:, None] * tl.load(out_weight + o_e * WIDTH + 2 * head, mask=m_e, other=0)[None, :]
        b_out += second[:, None] * tl.load(out_weight + o_e * WIDTH + 2 * head + 1, mask=m_e, other=0)[None, :]
    store_rows(features, b_out, o_row, m_query, o_e, WIDTH)
