"""Policy losses in Triton: one pass over the tokens stores the gradient; partial sums are added up in a fixed order.

By token, a program takes a few blocks of tokens in turn and looks their sequences up. With an option on whole
sequences (a ratio or a sampler weight for each), it takes a few sequences in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.device import on_device_of
from v05.kernels.policy_loss.options import (
    BY_COVARIANCE,
    FIELDS,
    Correction,
    Inputs,
    Kinds,
    Kl,
    Numbers,
    whole_sequences,
)
from v05.kernels.policy_loss.triton_blocks import (
    load_block,
    load_kept,
    load_tokens,
    places_of,
    sequence_of,
    sequences_kept,
    sequences_of,
    span_of,
    store_block,
)
from v05.kernels.policy_loss.triton_sequences import sequence_kernel
from v05.kernels.policy_loss.triton_terms import UNCORRECTED, add_terms, no_sums, numbers_in, store_sums

BLOCK = 512
SUMMED = 1024  # partial sums at a time
WARPS = {4: 4, 8: 8}  # by the bytes of a number
EACH, ENOUGH = 16, 1024  # blocks of a program at most, and programs below which it takes fewer
MOST = 4096  # programs at most where they take sequences, of which each then has more
SCALED = 4096


@triton.jit(do_not_specialize=["tokens", "sequences", "each"])
def token_kernel(
    logprobs,
    old_logprobs,
    advantages,
    weights,
    offsets,
    ref_logprobs,
    sampler_logprobs,
    selected,
    gradient,
    partial,
    sequences: tl.int64,
    each: tl.int64,
    tokens: tl.int64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    covariance_coef: tl.float64,
    kl_coef: tl.float64,
    floor: tl.float64,
    cap: tl.float64,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SELECTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Loss terms and gradient of `each` blocks of tokens."""
    acc: tl.constexpr = gradient.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * each * BLOCK_T
    end = tl.minimum(begin + each * BLOCK_T, tokens)
    arrays = (logprobs, old_logprobs, weights, ref_logprobs, sampler_logprobs, selected)
    o_place = places_of(gradient, WIDE, BLOCK_T)
    numbers = numbers_in(acc, clip_low, clip_high, dual_clip, tau_pos, tau_neg, covariance_coef, kl_coef, floor, cap)
    sums = no_sums(acc, o_place.shape[0])
    last = begin * 0
    edge = begin
    if not PER_TOKEN:
        last = sequence_of(offsets, begin, last, sequences - 1)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for RAGGED in tl.static_range(2):  # the whole blocks, then what is left of one
        for start in range(whole if RAGGED else begin, end if RAGGED else whole, BLOCK_T):
            left = (end - start).to(tl.int32) if RAGGED else BLOCK_T
            weight, keep, logprob, old, ref, chosen = load_tokens(arrays, start, o_place, left, RAGGED)
            if PER_TOKEN:
                advantage = load_kept(advantages + start, o_place, left, keep, RAGGED)
            else:
                first = last
                if start + left > edge:
                    first, last = span_of(offsets, sequences, start, start + left, last)
                    edge = tl.load(offsets + last + 1)
                b_near = sequences_of(offsets, start, o_place, keep, first, last)
                advantage = tl.where(keep, tl.load(advantages + first + b_near), 0)
            correction = logprob
            if CORRECTION != UNCORRECTED:
                correction = load_kept(sampler_logprobs + start, o_place, left, keep, RAGGED)
            given = (weight, keep, logprob, old, advantage, logprob, chosen, correction, ref)
            direct, _slope, sums = add_terms(given, 1, numbers, sums, SURROGATE, 0, KL, CORRECTION, SELECTS)
            store_block(gradient + start, direct, o_place, left, RAGGED)
    store_sums(partial, sums, sequences_kept(weights, offsets, sequences).to(acc), SURROGATE, KL, CORRECTION, SELECTS)


@triton.jit(do_not_specialize=["programs"])
def finish_kernel(partial, loss, metrics, programs: tl.int64, BLOCK_P: tl.constexpr):
    """Adds one field up in a fixed order, in float64; the first is the loss."""
    field = tl.program_id(0)
    out = metrics + field - 1
    if field == 0:
        out = loss
    b_total = tl.zeros([BLOCK_P], tl.float64)
    for start in range(0, programs, BLOCK_P):
        o_program = start + tl.arange(0, BLOCK_P)
        b_total += tl.load(partial + field * programs + o_program, mask=o_program < programs, other=0).to(tl.float64)
    tl.store(out, tl.sum(b_total, axis=0))


@triton.jit(do_not_specialize=["length"])
def scale_kernel(values, factor, length: tl.int64, BLOCK_T: tl.constexpr):
    """Multiplies in place, where the factor is not 1."""
    by = tl.load(factor)
    if by != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK_T
        left = tl.minimum(length - start, BLOCK_T).to(tl.int32)
        o_place = tl.arange(0, BLOCK_T)
        values += start
        if left == BLOCK_T:
            store_block(values, load_block(values, o_place, left, False) * by, o_place, left, False)
        else:
            store_block(values, load_block(values, o_place, left, True) * by, o_place, left, True)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient in place by a scalar on its device; where that is 1, nothing is read or written."""
    if gradient.numel():
        with on_device_of(gradient):
            programs = triton.cdiv(gradient.numel(), SCALED)
            scale_kernel[(programs,)](gradient, factor, gradient.numel(), BLOCK_T=SCALED)
    return gradient


def aligned(*arrays: Tensor) -> bool:
    """Whether all begin at a multiple of 16 bytes."""
    return all(values.data_ptr() % 16 == 0 for values in arrays)


def registers(kinds: Kinds, wide: bool, size: int) -> dict[str, int]:
    """The compiler's option for the registers of a thread, where it has one: what is plain fits eight programs of
    tokens on a multiprocessor, or five of sequences. Left alone, it spills one or two registers to fit one program
    more."""
    if torch.version.hip:
        return {}
    plain = kinds.kl == Kl.NONE and kinds.correction == Correction.NONE and kinds.surrogate not in BY_COVARIANCE
    if size == 8:
        return {"maxnreg": 168}
    if whole_sequences(kinds):
        return {"maxnreg": 96 if plain else 144}
    return {"maxnreg": 64 if plain and wide else 128}


def rows_of(size: int) -> int:
    """Rows of a block of a sequence, which are the threads of a program."""
    return (64 if torch.version.hip else 32) * WARPS[size]


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; two launches, without waiting."""
    given = given.contiguous()
    p, o, a, w, bounds, q, v, selected = given
    tokens, sequences, size = given.tokens, given.sequences, p.element_size()
    if tokens == 0:
        return p.new_zeros(()), p.new_empty(0), p.new_zeros(FIELDS - 1)
    loss, gradient, metrics = (p.new_empty(shape) for shape in ((), tokens, FIELDS - 1))
    by_sequence = whole_sequences(kinds)
    if by_sequence:
        pieces = sequences
        each = triton.cdiv(pieces, MOST)
    else:
        pieces = triton.cdiv(tokens, BLOCK)
        each = min(EACH, triton.cdiv(pieces, ENOUGH))
    programs = triton.cdiv(pieces, each)
    partial = p.new_empty(FIELDS * programs)
    arguments = (p, o, a, w, bounds, q, v, selected, gradient, partial, sequences, each)
    wide = aligned(p, o, w)
    options = {"SURROGATE": kinds.surrogate, "KL": kinds.kl, "CORRECTION": kinds.correction, "BLOCK_T": BLOCK}
    options |= {"PER_TOKEN": given.per_token, "SELECTS": selected is not None, "num_warps": WARPS[size]}
    options |= registers(kinds, wide, size)
    with on_device_of(p):
        if by_sequence:
            sequence_kernel[(programs,)](*arguments, *by, LEVEL=kinds.level, ROWS=rows_of(size), **options)
        else:
            token_kernel[(programs,)](*arguments, tokens, *by, WIDE=wide, **options)
        finish_kernel[(FIELDS,)](partial, loss, metrics, programs, BLOCK_P=SUMMED)
    return loss, gradient, metrics
