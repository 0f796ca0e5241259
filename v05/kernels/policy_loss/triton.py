"""Policy losses in Triton: one pass over the tokens stores the gradient; partial sums are added up in a fixed order.

By token, a program takes a few blocks of tokens in turn and looks their sequences up. Options on whole sequences (a
ratio or a sampler weight for the sequence) give each sequence a program of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.device import on_device_of
from v05.kernels.policy_loss.options import BY_COVARIANCE, Correction, Inputs, Kinds, Kl, Numbers
from v05.kernels.policy_loss.scratch import FIELDS, make_scratch, whole_sequences
from v05.kernels.policy_loss.triton_blocks import (
    load_block,
    load_kept,
    places_of,
    sequence_of,
    sequences_of,
    span_of,
    store_block,
)
from v05.kernels.policy_loss.triton_sequences import sequence_kernel, sequences_kept, share_kernel
from v05.kernels.policy_loss.triton_terms import (
    KL_NONE,
    SEQUENCE_MASK,
    SEQUENCE_TRUNCATE,
    TOKEN_MASK,
    UNCORRECTED,
    add_terms,
)
from v05.kernels.shrinkage.triton import scalar

BLOCK = 512
BLOCK_SEQUENCE = 1024  # of one sequence, and of the partial sums
WARPS = {4: 4, 8: 8}  # by the bytes of a number
EACH, ENOUGH = 16, 1024  # blocks of a program at most, and programs below which it takes fewer
SCALED = 4096


@triton.jit
def store_sums(partial, sums, sequences_with_any, CORRECTION: tl.constexpr):
    """This program's sums, in the order of the loss and METRICS."""
    b_loss, b_ratio, b_x, b_kl, b_correction, b_kept, b_low, b_high, b_dual, b_passed, b_chosen = sums
    acc: tl.constexpr = b_loss.dtype
    programs = tl.num_programs(0).to(tl.int64)
    partial += tl.program_id(0)
    kept = tl.sum(b_kept, axis=0).to(acc)
    masked = kept * 0
    correction = kept
    if CORRECTION != UNCORRECTED:
        correction = tl.sum(b_correction, axis=0)
        if CORRECTION == TOKEN_MASK or CORRECTION == SEQUENCE_MASK:
            masked = kept - tl.sum(b_passed, axis=0).to(acc)
    tl.store(partial, tl.sum(b_loss, axis=0))
    tl.store(partial + programs, kept)
    tl.store(partial + 2 * programs, sequences_with_any)
    tl.store(partial + 3 * programs, tl.sum(b_ratio, axis=0))
    tl.store(partial + 4 * programs, tl.sum(b_x, axis=0))
    tl.store(partial + 5 * programs, tl.sum(b_low, axis=0).to(acc))
    tl.store(partial + 6 * programs, tl.sum(b_high, axis=0).to(acc))
    tl.store(partial + 7 * programs, tl.sum(b_dual, axis=0).to(acc))
    tl.store(partial + 8 * programs, tl.sum(b_kl, axis=0))
    tl.store(partial + 9 * programs, correction)
    tl.store(partial + 10 * programs, masked)
    tl.store(partial + 11 * programs, tl.sum(b_chosen, axis=0).to(acc))


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
    sequence_ratio,
    sequence_correction,
    gradient,
    by_ratio,
    partial,
    tokens: tl.int64,
    sequences: tl.int64,
    each: tl.int64,
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
    LEVEL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SELECTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Loss terms and gradient of `each` blocks of tokens; by_ratio is kept apart where the ratio is the sequence's."""
    acc: tl.constexpr = gradient.dtype.element_ty
    SEARCHES: tl.constexpr = not PER_TOKEN or LEVEL == 1 or CORRECTION >= SEQUENCE_TRUNCATE
    begin = tl.program_id(0).to(tl.int64) * each * BLOCK_T
    end = tl.minimum(begin + each * BLOCK_T, tokens)
    o_place = places_of(gradient, WIDE, BLOCK_T)
    clips = (scalar(clip_low, acc), scalar(clip_high, acc), scalar(dual_clip, acc))
    taus = (scalar(tau_pos, acc), scalar(tau_neg, acc))
    numbers = (clips, taus, scalar(covariance_coef, acc), scalar(kl_coef, acc), scalar(floor, acc), scalar(cap, acc))
    zero = tl.zeros([o_place.shape[0]], acc)
    none = tl.zeros([o_place.shape[0]], tl.float32)
    sums = (zero, zero, zero, zero, zero, none, none, none, none, none, none)
    last = begin * 0
    edge = begin
    if SEARCHES:
        last = sequence_of(offsets, begin, last, sequences - 1)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for RAGGED in tl.static_range(2):  # the whole blocks, then what is left of one
        for start in range(whole if RAGGED else begin, end if RAGGED else whole, BLOCK_T):
            left = (end - start).to(tl.int32) if RAGGED else BLOCK_T
            weight = load_block(weights + start, o_place, left, RAGGED)
            keep = weight != 0
            logprob = load_kept(logprobs + start, o_place, left, keep, RAGGED)
            old = load_kept(old_logprobs + start, o_place, left, keep, RAGGED)
            first = last
            b_near = o_place
            if SEARCHES:
                if start + left > edge:
                    first, last = span_of(offsets, sequences, start, start + left, last)
                    edge = tl.load(offsets + last + 1)
                b_near = sequences_of(offsets, start, o_place, keep, first, last)
            if PER_TOKEN:
                advantage = load_kept(advantages + start, o_place, left, keep, RAGGED)
            else:
                advantage = tl.where(keep, tl.load(advantages + first + b_near), 0)
            ratio = logprob
            if LEVEL == 1:
                ratio = tl.where(keep, tl.load(sequence_ratio + first + b_near), 1)
            chosen = keep
            if SELECTS:
                chosen = keep & (load_block(selected + start, o_place, left, RAGGED) != 0)
            correction = logprob
            if CORRECTION >= SEQUENCE_TRUNCATE:
                correction = tl.where(keep, tl.load(sequence_correction + first + b_near), 0)
            elif CORRECTION != UNCORRECTED:
                correction = load_kept(sampler_logprobs + start, o_place, left, keep, RAGGED)
            ref = logprob
            if KL != KL_NONE:
                ref = load_kept(ref_logprobs + start, o_place, left, keep, RAGGED)
            given = (weight, keep, logprob, old, advantage, ratio, chosen, correction, ref)
            direct, slope, sums = add_terms(given, numbers, sums, SURROGATE, LEVEL, KL, CORRECTION, SELECTS)
            if LEVEL == 1:
                store_block(by_ratio + start, slope, o_place, left, RAGGED)
            store_block(gradient + start, direct, o_place, left, RAGGED)
    store_sums(partial, sums, sequences_kept(weights, offsets, sequences).to(acc), CORRECTION)


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
    """The compiler's option for the registers of a thread of the pass over tokens, where it has one: what is plain fits
    eight programs on a multiprocessor. Left alone, it spills one or two registers to fit one program more."""
    if torch.version.hip:
        return {}
    plain = wide and kinds.level == 0 and kinds.kl == Kl.NONE and kinds.correction == Correction.NONE
    most = 64 if plain and kinds.surrogate not in BY_COVARIANCE else 128
    return {"maxnreg": most if size == 4 else 168}


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; two launches, up to two more for options on sequences, without waiting."""
    given = given.contiguous()
    p, o, a, w, bounds, q, v, chosen = given
    logprobs, tokens, sequences = given.logprobs, given.tokens, given.sequences
    if tokens == 0:
        return logprobs.new_zeros(()), logprobs.new_empty(0), logprobs.new_zeros(FIELDS - 1)
    loss, gradient, metrics = (logprobs.new_empty(size) for size in ((), tokens, FIELDS - 1))
    blocks = triton.cdiv(tokens, BLOCK)
    each = min(EACH, triton.cdiv(blocks, ENOUGH))
    programs = triton.cdiv(blocks, each)
    scratch = make_scratch(logprobs, sequences, kinds, programs)
    partial, kept, ratio, correction, by_ratio = scratch
    warps = WARPS[logprobs.element_size()]
    wide = aligned(p, o, w)
    by_sequence = {"BLOCK_T": BLOCK_SEQUENCE, "num_warps": warps}
    with on_device_of(logprobs):
        if whole_sequences(kinds):
            bounds_of = (by.sampler_floor, by.sampler_cap)
            sequence_kernel[(sequences,)](
                *(p, o, w, v, bounds, kept, ratio, correction, *bounds_of),
                LEVEL=kinds.level,
                CORRECTION=kinds.correction,
                **by_sequence,
            )
        state = (ratio, correction, gradient, by_ratio, partial)
        token_kernel[(programs,)](
            *(p, o, a, w, bounds, q, v, chosen, *state, tokens, sequences, each, *by),
            SURROGATE=kinds.surrogate,
            KL=kinds.kl,
            PER_TOKEN=given.per_token,
            SELECTS=chosen is not None,
            WIDE=wide,
            LEVEL=kinds.level,
            CORRECTION=kinds.correction,
            BLOCK_T=BLOCK,
            num_warps=warps,
            **registers(kinds, wide, logprobs.element_size()),
        )
        if kinds.level == 1:
            share_kernel[(sequences,)](p, o, w, bounds, kept, by_ratio, gradient, **by_sequence)
        finish_kernel[(FIELDS,)](partial, loss, metrics, programs, BLOCK_P=BLOCK_SEQUENCE)
    return loss, gradient, metrics
