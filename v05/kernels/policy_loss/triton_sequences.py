"""What policy losses in Triton do by sequence: a program takes one sequence, before and after the pass over tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.policy_loss.triton_terms import (
    BOUND,
    SEQUENCE_MASK,
    SEQUENCE_TRUNCATE,
    clamped,
    log_ratio,
    sampler_weight,
)
from v05.kernels.shrinkage.triton import scalar

COUNTED = tl.constexpr(16)  # sequences of a program at a time
SCANNED = tl.constexpr(32)  # tokens of each looked at in one step


@triton.jit
def load_kept(values, o_token, m_keep):
    """Values of unmasked tokens and 0 elsewhere: what a masked token holds is never read."""
    return tl.load(values + o_token, mask=m_keep, other=0)


@triton.jit
def sequences_kept(weights, offsets, sequences):
    """A program's share of the sequences with an unmasked token, counted."""
    b_kept = tl.zeros([COUNTED], tl.int32)
    step = tl.num_programs(0).to(tl.int64) * COUNTED
    for start in range(tl.program_id(0).to(tl.int64) * COUNTED, sequences, step):
        o_sequence = start + tl.arange(0, COUNTED)
        m_sequence = o_sequence < sequences
        b_cursor = tl.load(offsets + o_sequence, mask=m_sequence, other=0)
        b_end = tl.load(offsets + o_sequence + 1, mask=m_sequence, other=0)
        b_found = tl.zeros([COUNTED], tl.int32)
        while tl.max(tl.where(b_found == 0, b_end - b_cursor, 0), axis=0) > 0:
            o_token = b_cursor[:, None] + tl.arange(0, SCANNED)[None, :]
            m_token = (o_token < b_end[:, None]) & (b_found == 0)[:, None]
            b_weight = tl.load(weights + o_token, mask=m_token, other=0)
            b_found += tl.max((b_weight != 0).to(tl.int32), axis=1)
            b_cursor += SCANNED
        b_kept += b_found
    return tl.sum(b_kept, axis=0)


@triton.jit
def sequence_kernel(
    logprobs,
    old_logprobs,
    weights,
    sampler_logprobs,
    offsets,
    kept,
    sequence_ratio,
    sequence_correction,
    floor: tl.float64,
    cap: tl.float64,
    LEVEL: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One sequence: the ratio of its mean and its sampler weight, whichever is asked for."""
    acc: tl.constexpr = sequence_correction.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + sequence + 1)
    count = tl.full([], 0, acc)
    x_sum = tl.full([], 0, tl.float64)
    sampler_sum = tl.full([], 0, tl.float64)
    for start in range(tl.load(offsets + sequence), end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        m_keep = tl.load(weights + o_token, mask=o_token < end, other=0) != 0
        count += tl.sum(m_keep.to(acc), axis=0)
        b_old = load_kept(old_logprobs, o_token, m_keep)
        if LEVEL == 1:
            b_x, _b_moves = log_ratio(load_kept(logprobs, o_token, m_keep), b_old)
            x_sum += tl.sum(b_x.to(tl.float64), axis=0)
        if CORRECTION >= SEQUENCE_TRUNCATE:
            b_x, _b_moves = log_ratio(b_old, load_kept(sampler_logprobs, o_token, m_keep))
            sampler_sum += tl.sum(b_x.to(tl.float64), axis=0)
    if LEVEL == 1:
        tl.store(kept + sequence, count)
        tl.store(sequence_ratio + sequence, tl.exp((x_sum / tl.maximum(count, 1)).to(acc)))
    if CORRECTION >= SEQUENCE_TRUNCATE:
        ratio = tl.exp(clamped(sampler_sum, -BOUND, BOUND)).to(acc)
        weight = sampler_weight(ratio, scalar(floor, acc), scalar(cap, acc), CORRECTION == SEQUENCE_MASK)
        tl.store(sequence_correction + sequence, weight)


@triton.jit
def share_kernel(logprobs, old_logprobs, weights, offsets, kept, by_ratio, gradient, BLOCK_T: tl.constexpr):
    """Gives each token of a sequence its share of the derivative by the sequence's mean log-ratio."""
    acc: tl.constexpr = gradient.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets + sequence)
    end = tl.load(offsets + sequence + 1)
    total = tl.full([], 0, tl.float64)
    for start in range(begin, end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        total += tl.sum(tl.load(by_ratio + o_token, mask=o_token < end, other=0).to(tl.float64), axis=0)
    part = (total / tl.maximum(tl.load(kept + sequence), 1)).to(acc)
    for start in range(begin, end, BLOCK_T):
        o_token = start + tl.arange(0, BLOCK_T)
        m_keep = tl.load(weights + o_token, mask=o_token < end, other=0) != 0
        _x, moves = log_ratio(load_kept(logprobs, o_token, m_keep), load_kept(old_logprobs, o_token, m_keep))
        direct = tl.load(gradient + o_token, mask=m_keep, other=0)
        tl.store(gradient + o_token, direct + moves * part, mask=m_keep)
