"""Narrow rows in Triton: a tile `[rows, PADDED]` holds WIDTH numbers of each row, and zeros or a one after them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(rows, o_row, m_row, o_e, WIDTH: tl.constexpr):
    """Rows of WIDTH numbers that lie one after the other; 0 elsewhere."""
    mask = m_row[:, None] & (o_e < WIDTH)[None, :]
    return tl.load(rows + o_row[:, None] * WIDTH + o_e[None, :], mask=mask, other=0)


@triton.jit
def store_rows(rows, b_rows, o_row, m_row, o_e, WIDTH: tl.constexpr):
    """The opposite of load_rows."""
    mask = m_row[:, None] & (o_e < WIDTH)[None, :]
    tl.store(rows + o_row[:, None] * WIDTH + o_e[None, :], b_rows, mask=mask)


@triton.jit
def load_vector(values, o_e, WIDTH: tl.constexpr):
    """WIDTH numbers and zeros, as a row that is the same for all."""
    return tl.load(values + o_e, mask=o_e < WIDTH, other=0)[None, :]


@triton.jit
def normalised(b_x, o_e, eps, WIDTH: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of each row, and 1 / sqrt(variance + eps)."""
    mean = tl.sum(b_x, axis=1) / WIDTH
    b_gap = tl.where((o_e < WIDTH)[None, :], b_x - mean[:, None], 0)
    inverse = 1 / tl.sqrt(tl.sum(b_gap * b_gap, axis=1) / WIDTH + eps)
    return b_gap * inverse[:, None], inverse


@triton.jit
def normalised_backward(b_grad, b_hat, inverse, o_e, WIDTH: tl.constexpr):
    """Gradient by x, given that by the normalised rows."""
    mean = tl.sum(b_grad, axis=1) / WIDTH
    along = tl.sum(b_grad * b_hat, axis=1) / WIDTH
    b_x = (b_grad - mean[:, None] - b_hat * along[:, None]) * inverse[:, None]
    return tl.where((o_e < WIDTH)[None, :], b_x, 0)


@triton.jit
def column(b_rows, o_e, e):
    """Number e of each row."""
    return tl.sum(tl.where((o_e == e)[None, :], b_rows, 0), axis=1)


@triton.jit
def as_column(values, o_e, e):
    """A tile that holds values as number e of each row, and zeros."""
    return tl.where((o_e == e)[None, :], values[:, None], 0)


@triton.jit
def in_own_lanes(b_repeated, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """The tile `[ROWS, PADDED]` whose numbers each row repeats ROWS times: a row moves to its lanes unconverted."""
    own = (tl.arange(0, ROWS * PADDED) // PADDED)[None, :] == tl.arange(0, ROWS)[:, None]
    return tl.reshape(tl.sum(tl.where(own, b_repeated, 0), axis=0), [ROWS, PADDED])


@triton.jit
def product(b_rows, weight, bias, e, o_e, WIDTH: tl.constexpr):
    """Number e of weight x + bias of each row."""
    b_weight = load_vector(weight + e * WIDTH, o_e, WIDTH)
    return tl.sum(b_rows * b_weight, axis=1) + tl.load(bias + e)


@triton.jit
def product_backward(b_grad, weight, o_e, WIDTH: tl.constexpr):
    """Gradient by x of weight x."""
    b_x = tl.zeros_like(b_grad)
    for e in range(WIDTH):
        b_x += column(b_grad, o_e, e)[:, None] * load_vector(weight + e * WIDTH, o_e, WIDTH)
    return b_x


@triton.jit
def store_sums(sums, b_grad, b_x, o_e, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """sums `[WIDTH, PADDED]`: over the rows, gradient i times x_j, and gradient i alone in the column after those."""
    b_x = tl.where((o_e == WIDTH)[None, :], 1, b_x)
    for e in range(WIDTH):
        tl.store(sums + e * PADDED + o_e, tl.sum(column(b_grad, o_e, e)[:, None] * b_x, axis=0))


@triton.jit
def store_keys(
    keys, b_kv, in_weight, in_bias, key_norm, key_norm_bias, o_token, m_token, tokens, o_e, eps, WIDTH: tl.constexpr
):
    """keys `[2 WIDTH, T]`: keys, then values, of the tokens whose projected states are given."""
    b_hat, _inverse = normalised(b_kv, o_e, eps, WIDTH)
    b_affine = b_hat * load_vector(key_norm, o_e, WIDTH) + load_vector(key_norm_bias, o_e, WIDTH)
    for e in range(WIDTH):
        k = product(b_affine, in_weight, in_bias, WIDTH + e, o_e, WIDTH)
        v = product(b_kv, in_weight, in_bias, 2 * WIDTH + e, o_e, WIDTH)
        tl.store(keys + e * tokens + o_token, k, mask=m_token)
        tl.store(keys + (WIDTH + e) * tokens + o_token, v, mask=m_token)


@triton.jit
def affine_queries(queries, query_norm, query_norm_bias, o_row, m_row, o_e, eps, WIDTH: tl.constexpr):
    """Normalised queries before and after scale and shift, and what normalised them."""
    b_hat, inverse = normalised(load_rows(queries, o_row, m_row, o_e, WIDTH), o_e, eps, WIDTH)
    b_affine = b_hat * load_vector(query_norm, o_e, WIDTH) + load_vector(query_norm_bias, o_e, WIDTH)
    return b_hat, b_affine, inverse
