"""Policy losses in Triton: one pass over the tokens stores the gradient; partial sums are added up in a fixed order.

By token, a program takes a block of tokens and looks their sequences up. Options on whole sequences (a ratio or a
sampler weight for the sequence) give each sequence a program of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from v05.kernels.device import on_device_of
from v05.kernels.policy_loss.options import Inputs, Kinds, Numbers
from v05.kernels.policy_loss.scratch import FIELDS, make_scratch, whole_sequences
from v05.kernels.policy_loss.triton_sequences import (
    count_kernel,
    load_kept,
    sequence_kernel,
    sequences_of,
    share_kernel,
)
from v05.kernels.policy_loss.triton_terms import (
    KL_NONE,
    SEQUENCE_MASK,
    SEQUENCE_TRUNCATE,
    TOKEN_MASK,
    UNCORRECTED,
    kl_term,
    log_ratio,
    sampler_weight,
    surrogate_term,
)
from v05.kernels.shrinkage.triton import scalar

BLOCK = 1024
WARPS = {4: 4, 8: 8}  # by the bytes of a number
SCALED = 4096


@triton.jit
def correction_of(
    sequence_correction, sampler_logprobs, o_sequence, o_token, keep, old, bounds, CORRECTION: tl.constexpr
):
    """The sampler weight of each token: its own or its sequence's, 1 where nothing is corrected, 0 where masked."""
    correction = tl.where(keep, 1.0, 0.0).to(old.dtype)
    if CORRECTION >= SEQUENCE_TRUNCATE:
        correction = tl.load(sequence_correction + o_sequence, mask=keep, other=0)
    elif CORRECTION != UNCORRECTED:
        z, _moves = log_ratio(old, load_kept(sampler_logprobs, o_token, keep))
        own = sampler_weight(tl.exp(z), bounds[0], bounds[1], CORRECTION == TOKEN_MASK)
        correction = tl.where(keep, own, 0)
    return correction


@triton.jit
def store_sums(partial, programs, value, keep, ratio, x, low, high, dual, kl, correction, chosen, MASKS: tl.constexpr):
    """This program's sums, in the order of the loss and METRICS; sequences are counted elsewhere."""
    acc: tl.constexpr = value.dtype
    count = tl.sum(keep.to(acc), axis=0)
    passed = tl.sum((correction != 0).to(acc), axis=0)
    tl.store(partial, tl.sum(tl.where(keep, value, 0), axis=0))
    tl.store(partial + programs, count)
    tl.store(partial + 3 * programs, tl.sum(tl.where(keep, ratio, 0), axis=0))
    tl.store(partial + 4 * programs, tl.sum(x, axis=0))
    tl.store(partial + 5 * programs, tl.sum((keep & low).to(acc), axis=0))
    tl.store(partial + 6 * programs, tl.sum((keep & high).to(acc), axis=0))
    tl.store(partial + 7 * programs, tl.sum((keep & dual).to(acc), axis=0))
    tl.store(partial + 8 * programs, tl.sum(tl.where(keep, kl, 0), axis=0))
    tl.store(partial + 9 * programs, tl.sum(correction, axis=0))
    tl.store(partial + 10 * programs, (count - passed) if MASKS else count * 0)
    tl.store(partial + 11 * programs, tl.sum(chosen.to(acc), axis=0))


@triton.jit(do_not_specialize=["tokens", "sequences"])
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
    BLOCK_T: tl.constexpr,
):
    """Loss terms and gradient of a block of tokens; by_ratio is kept apart where the ratio is the sequence's."""
    acc: tl.constexpr = gradient.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    o_token = program * BLOCK_T + tl.arange(0, BLOCK_T)
    m_token = o_token < tokens
    weight = tl.load(weights + o_token, mask=m_token, other=0)
    keep = weight != 0
    logprob = load_kept(logprobs, o_token, keep)
    old = load_kept(old_logprobs, o_token, keep)
    o_advantage = o_token
    o_sequence = o_token
    if not PER_TOKEN or LEVEL == 1 or CORRECTION >= SEQUENCE_TRUNCATE:
        o_sequence = sequences_of(offsets, o_token, m_token, program * BLOCK_T, tokens, sequences, BLOCK_T)
        if not PER_TOKEN:
            o_advantage = o_sequence
    advantage = load_kept(advantages, o_advantage, keep)
    x, moves = log_ratio(logprob, old)
    if LEVEL == 1:
        ratio = tl.load(sequence_ratio + o_sequence, mask=keep, other=1)
    else:
        ratio = tl.exp(x)
    chosen = advantage != advantage
    if SELECTS:
        chosen = keep & (tl.load(selected + o_token, mask=keep, other=0) != 0)
    value, slope, direct, low, high, dual = surrogate_term(
        logprob,
        x,
        moves,
        ratio,
        advantage,
        chosen,
        scalar(clip_low, acc),
        scalar(clip_high, acc),
        scalar(dual_clip, acc),
        scalar(tau_pos, acc),
        scalar(tau_neg, acc),
        scalar(covariance_coef, acc),
        SURROGATE,
    )
    bounds = (scalar(floor, acc), scalar(cap, acc))
    correction = correction_of(
        sequence_correction, sampler_logprobs, o_sequence, o_token, keep, old, bounds, CORRECTION
    )
    scale = weight * correction
    total = scale * value
    direct, slope = scale * direct, scale * slope
    kl = value * 0
    if KL != KL_NONE:
        kl, kl_slope = kl_term(logprob, load_kept(ref_logprobs, o_token, keep), KL)
        total += weight * scalar(kl_coef, acc) * kl
        direct += weight * scalar(kl_coef, acc) * kl_slope
    if LEVEL == 1:
        tl.store(by_ratio + o_token, slope, mask=m_token)
    else:
        direct += moves * slope
    tl.store(gradient + o_token, tl.where(keep, direct, 0), mask=m_token)

    masks: tl.constexpr = CORRECTION == TOKEN_MASK or CORRECTION == SEQUENCE_MASK
    partial += program
    store_sums(partial, programs, total, keep, ratio, x, low, high, dual, kl, correction, chosen, masks)


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
        o_value = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_value = o_value < length
        b_value = tl.load(values + o_value, mask=m_value, other=0).to(factor.dtype.element_ty) * by
        tl.store(values + o_value, b_value.to(values.dtype.element_ty), mask=m_value)


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies a gradient in place by a scalar on its device; where that is 1, nothing is read or written."""
    if gradient.numel():
        with on_device_of(gradient):
            programs = triton.cdiv(gradient.numel(), SCALED)
            scale_kernel[(programs,)](gradient, factor, gradient.numel(), BLOCK_T=SCALED)
    return gradient


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as the CPU backend; three launches, up to two more for options on sequences, without waiting."""
    given = given.contiguous()
    p, o, a, w, bounds, q, v, chosen = given
    logprobs, tokens, sequences = given.logprobs, given.tokens, given.sequences
    if tokens == 0:
        return logprobs.new_zeros(()), logprobs.new_empty(0), logprobs.new_zeros(FIELDS - 1)
    loss, gradient, metrics = (logprobs.new_empty(size) for size in ((), tokens, FIELDS - 1))
    programs = triton.cdiv(tokens, BLOCK)
    scratch = make_scratch(logprobs, sequences, kinds, programs)
    partial, kept, ratio, correction, by_ratio = scratch
    warps = WARPS[logprobs.element_size()]
    shared = {"LEVEL": kinds.level, "CORRECTION": kinds.correction, "BLOCK_T": BLOCK, "num_warps": warps}
    with on_device_of(logprobs):
        if whole_sequences(kinds):
            bounds_of = (by.sampler_floor, by.sampler_cap)
            sequence_kernel[(sequences,)](p, o, w, v, bounds, kept, ratio, correction, *bounds_of, **shared)
        count_kernel[(programs,)](w, bounds, partial, sequences)
        state = (ratio, correction, gradient, by_ratio, partial)
        token_kernel[(programs,)](
            *(p, o, a, w, bounds, q, v, chosen, *state, tokens, sequences, *by),
            SURROGATE=kinds.surrogate,
            KL=kinds.kl,
            PER_TOKEN=given.per_token,
            SELECTS=chosen is not None,
            **shared,
        )
        if kinds.level == 1:
            share_kernel[(sequences,)](p, o, w, bounds, kept, by_ratio, gradient, BLOCK_T=BLOCK, num_warps=warps)
        finish_kernel[(FIELDS,)](partial, loss, metrics, programs, BLOCK_P=BLOCK)
    return loss, gradient, metrics
