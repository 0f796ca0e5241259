"""Blocks of neighbouring tokens in Triton: loads and stores of 16 bytes a thread, and whose tokens these are."""

from __future__ import annotations

import triton
import triton.language as tl

PROBES = tl.constexpr(32)  # sequences looked at in one step of a search, which takes a warp and no shared memory
IN_TURN = tl.constexpr(16)  # sequences of a block that are gone through in turn; more are searched
COUNTED = tl.constexpr(16)  # sequences of a program at a time
SCANNED = tl.constexpr(32)  # tokens of each looked at in one step


@triton.jit
def places_of(like, WIDE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The places 0 to BLOCK_T of a block, a row a thread: neighbours of 16 bytes if wide, and else far apart."""
    LANE: tl.constexpr = 128 // like.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = BLOCK_T // LANE
    o_row = tl.arange(0, ROWS)[:, None]
    o_lane = tl.arange(0, LANE)[None, :]
    if WIDE:
        o_place = o_row * LANE + o_lane
    else:
        o_place = o_row + o_lane * ROWS
    return o_place


@triton.jit
def load_block(values, o_place, left, RAGGED: tl.constexpr):
    """A block; of a ragged one the first `left` values are there, and anything past these."""
    if RAGGED:
        b_value = tl.load(values + o_place, mask=o_place < left)
    else:
        b_value = tl.load(values + o_place)
    return b_value


@triton.jit
def load_weights(weights, o_place, left, RAGGED: tl.constexpr):
    """The weights of a block, 0 past the end of a ragged one, and which are not 0."""
    if RAGGED:
        weight = tl.load(weights + o_place, mask=o_place < left, other=0)
    else:
        weight = tl.load(weights + o_place)
    return weight, weight != 0


@triton.jit
def load_kept(values, o_place, left, keep, RAGGED: tl.constexpr):
    """A block with 0 for masked tokens: what these hold is read, together with the rest, but never used."""
    return tl.where(keep, load_block(values, o_place, left, RAGGED), 0)


@triton.jit
def load_tokens(arrays, start, o_place, left, RAGGED: tl.constexpr):
    """A block of what is given for each token: weight, whether that is not 0, log-prob, old one, the reference's and
    whether it is selected. Where there is no reference or selection, something of that kind stands for it."""
    logprobs, old_logprobs, weights, ref_logprobs, _sampler_logprobs, selected = arrays
    weight, keep = load_weights(weights + start, o_place, left, RAGGED)
    logprob = load_kept(logprobs + start, o_place, left, keep, RAGGED)
    old = load_kept(old_logprobs + start, o_place, left, keep, RAGGED)
    ref = logprob
    if ref_logprobs is not None:
        ref = load_kept(ref_logprobs + start, o_place, left, keep, RAGGED)
    chosen = keep
    if selected is not None:
        chosen = keep & (load_block(selected + start, o_place, left, RAGGED) != 0)
    return weight, keep, logprob, old, ref, chosen


@triton.jit
def store_block(values, b_value, o_place, left, RAGGED: tl.constexpr):
    """Stores a block, of a ragged one the first `left` values."""
    if RAGGED:
        tl.store(values + o_place, b_value, mask=o_place < left)
    else:
        tl.store(values + o_place, b_value)


@triton.jit
def sequence_of(offsets, token, low, last):
    """The last sequence of low to last that begins at or before a token, as low does."""
    while low < last:
        step = (last - low + PROBES) // PROBES
        o_probe = low + tl.arange(0, PROBES) * step
        before = tl.load(offsets + o_probe, mask=o_probe <= last, other=token + 1) <= token
        low += (tl.sum(before.to(tl.int32), axis=0) - 1) * step
        last = tl.minimum(last, low + step - 1)
    return low


@triton.jit
def span_of(offsets, sequences, start, end, low):
    """The sequences of the first and the last of the tokens from start to end, looked for from `low` on: nearby, a step
    finds both."""
    o_probe = low + tl.arange(0, PROBES)
    begin = tl.load(offsets + o_probe, mask=o_probe < sequences, other=end)
    first = low + tl.sum((begin <= start).to(tl.int32), axis=0) - 1
    last = low + tl.sum((begin < end).to(tl.int32), axis=0) - 1
    if last == low + PROBES - 1:
        first = sequence_of(offsets, start, first, sequences - 1)
        last = sequence_of(offsets, end - 1, first, sequences - 1)
    return first, last


@triton.jit
def sequences_of(offsets, start, o_place, keep, first, last):
    """The sequence of each unmasked token of a block, counted from its first one."""
    b_near = o_place * 0
    span = (last - first).to(tl.int32)
    offsets += first
    if span <= IN_TURN:
        for s in range(1, span + 1):
            b_near += (keep & ((tl.load(offsets + s) - start).to(tl.int32) <= o_place)).to(tl.int32)
    else:
        b_high = tl.where(keep, span, 0)
        while span > 0:
            b_middle = (b_near + b_high + 1) // 2
            before = (tl.load(offsets + b_middle) - start).to(tl.int32) <= o_place
            b_near = tl.where(before, b_middle, b_near)
            b_high = tl.where(before, b_high, b_middle - 1)
            span = span // 2
    return b_near


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
