"""The terms of a policy loss in Triton: log-ratios, surrogates and KL estimates with their derivatives.

The mathematics of csrc/formulas.h, where each surrogate's paper is named, once more for this language.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.policy_loss.options import LOG_RATIO_BOUND, Correction, Kl, Surrogate
from v05.kernels.shrinkage.triton import scalar

PPO = tl.constexpr(int(Surrogate.PPO))
CISPO = tl.constexpr(int(Surrogate.CISPO))
SAPO = tl.constexpr(int(Surrogate.SAPO))
GPG = tl.constexpr(int(Surrogate.GPG))
CLIP_COV = tl.constexpr(int(Surrogate.CLIP_COV))
KL_COV = tl.constexpr(int(Surrogate.KL_COV))
KL_NONE = tl.constexpr(int(Kl.NONE))
K1 = tl.constexpr(int(Kl.K1))
K2 = tl.constexpr(int(Kl.K2))
K3 = tl.constexpr(int(Kl.K3))
K1_PLUS = tl.constexpr(int(Kl.K1_PLUS))
UNCORRECTED = tl.constexpr(int(Correction.NONE))
TOKEN_TRUNCATE = tl.constexpr(int(Correction.TOKEN_TRUNCATE))
TOKEN_MASK = tl.constexpr(int(Correction.TOKEN_MASK))
SEQUENCE_TRUNCATE = tl.constexpr(int(Correction.SEQUENCE_TRUNCATE))
SEQUENCE_MASK = tl.constexpr(int(Correction.SEQUENCE_MASK))
BOUND = tl.constexpr(LOG_RATIO_BOUND)


@triton.jit
def clamped(x, low, high):
    """x between two bounds; NaN stays NaN, which a GPU's minimum drops unless told, in float64 anyhow."""
    if x.dtype == tl.float64:
        x = tl.where(x < low, low, tl.where(x > high, high, x))
    else:
        x = tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
    return x


@triton.jit
def log_ratio(a, b):
    """a - b cut off at the bound and 1 within it, else 0; two equal infinities differ by 0, without slope."""
    gap = a - b
    bounded = tl.where(a == b, 0, clamped(gap, -BOUND, BOUND))
    return bounded, tl.where(tl.abs(gap) <= BOUND, 1.0, 0.0).to(gap.dtype)


@triton.jit
def sampler_weight(ratio, floor, cap, MASKS: tl.constexpr):
    """The ratio truncated at the cap, or 0 outside floor and cap."""
    if MASKS:
        weight = tl.where((ratio >= floor) & (ratio <= cap), ratio, 0)
    else:
        weight = tl.where(ratio > cap, cap, ratio)
    return weight


@triton.jit
def clipped_term(ratio, advantage, clip_low, clip_high, dual_clip):
    """-A times the ratio, clipped on the side that the sign of A makes active; and which bound held it back."""
    negative = advantage < 0
    bottom = tl.where(negative, 1 - clip_low, 0)
    top = tl.where(negative, dual_clip, 1 + clip_high)
    kept = clamped(ratio, bottom, top)
    slope = tl.where(kept == ratio, -advantage * ratio, 0)
    return (
        -advantage * kept,
        slope,
        negative & (ratio < bottom),
        (advantage > 0) & (ratio > top),
        negative & (ratio > top),
    )


@triton.jit
def surrogate_term(
    logprob,
    x,
    moves,
    ratio,
    advantage,
    selected,
    numbers,
    SURROGATE: tl.constexpr,
):
    """A token's loss before its weight, its derivatives by log ratio and by log-prob, and which bound held it back."""
    clips, taus, covariance_coef, _kl_coef, _floor, _cap = numbers
    clip_low, clip_high, dual_clip = clips
    tau_pos, tau_neg = taus
    zero = tl.zeros_like(advantage)
    value = -advantage * logprob  # gpg
    by_ratio = zero
    by_logprob = -advantage
    low = tl.zeros_like(selected)
    high = low
    dual = low
    if SURROGATE == PPO or SURROGATE == CLIP_COV:
        value, by_ratio, low, high, dual = clipped_term(ratio, advantage, clip_low, clip_high, dual_clip)
        by_logprob = zero
    if SURROGATE == CLIP_COV:
        value = tl.where(selected, 0, value)
        by_ratio = tl.where(selected, 0, by_ratio)
        dual = tl.zeros_like(selected)
    if SURROGATE == CISPO:
        by_logprob = -advantage * clamped(ratio, 1 - clip_low, 1 + clip_high)
        value = by_logprob * logprob
        low = ratio < 1 - clip_low
        high = ratio > 1 + clip_high
    if SURROGATE == SAPO:
        tau = tl.where(advantage > 0, tau_pos, tau_neg)
        gate = tl.exp(-tau * (ratio - 1))
        sigmoid = 1 / (1 + gate)
        value = -advantage * (4 / tau) * sigmoid
        by_ratio = -advantage * 4 * sigmoid * (gate * sigmoid) * ratio
        by_logprob = zero
    if SURROGATE == KL_COV:
        pull = tl.where(selected, covariance_coef, 0)
        value = -advantage * ratio + pull * tl.abs(x)
        by_ratio = -advantage * ratio
        by_logprob = pull * moves * (tl.where(x > 0, 1, 0) - tl.where(x < 0, 1, 0))
    return value, by_ratio, by_logprob, low, high, dual


@triton.jit
def kl_term(logprob, ref_logprob, KL: tl.constexpr):
    """An estimate of KL(policy || reference) and its slope by the log-prob; a + has the slope of k2."""
    gap = ref_logprob - logprob
    defined = (gap == gap) | (ref_logprob != logprob)  # equal infinities differ by nothing
    y = tl.where(defined, gap, 0)
    if KL == K1:
        value = -y
        slope = y * 0 + 1
    elif KL == K2:
        value = y * y / 2
        slope = -y
    elif KL == K1_PLUS:
        value = -y
        slope = -y
    else:
        bounded, moves = log_ratio(ref_logprob, logprob)
        power = tl.exp(bounded)
        value = power - bounded - 1
        if KL == K3:
            slope = moves * (1 - power)
        else:
            slope = -y
    return value, tl.where(defined, slope, 0)


@triton.jit
def numbers_in(
    acc: tl.constexpr, clip_low, clip_high, dual_clip, tau_pos, tau_neg, covariance_coef, kl_coef, floor, cap
):
    """The numbers of options.Numbers in the dtype of the tokens, as the terms take them."""
    clips = (scalar(clip_low, acc), scalar(clip_high, acc), scalar(dual_clip, acc))
    taus = (scalar(tau_pos, acc), scalar(tau_neg, acc))
    return clips, taus, scalar(covariance_coef, acc), scalar(kl_coef, acc), scalar(floor, acc), scalar(cap, acc)


@triton.jit
def no_sums(acc: tl.constexpr, ROWS: tl.constexpr):
    """Sums of rows that nothing was added to: of numbers, then of flags."""
    zero = tl.zeros([ROWS], acc)
    none = tl.zeros([ROWS], tl.float32)
    return zero, zero, zero, zero, zero, none, none, none, none, none, none


@triton.jit
def count(flags):
    """How many of each row are set, exactly."""
    return tl.sum(tl.where(flags, 1.0, 0.0), axis=1)


@triton.jit
def add_terms(
    given,
    times,
    numbers,
    sums,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SELECTS: tl.constexpr,
):
    """The gradient of a block of tokens and, where the ratio is the sequence's, the derivative by it; and the sums
    of rows with this block's added. All that a masked token has is 0, but for a ratio of 1: it adds nothing. A token
    counts so many times, with a weight for all of these."""
    weight, keep, logprob, old, advantage, ratio, chosen, correction, ref = given
    b_loss, b_ratio, b_x, b_kl, b_correction, b_kept, b_low, b_high, b_dual, b_passed, b_chosen = sums
    x, moves = log_ratio(logprob, old)
    b_kept += times * count(keep)
    b_x += times * tl.sum(x, axis=1)
    if LEVEL == 0:
        ratio = tl.exp(x)
    b_ratio += times * tl.sum(tl.where(keep, ratio, 0), axis=1)
    value, slope, direct, low, high, dual = surrogate_term(
        logprob, x, moves, ratio, advantage, chosen, numbers, SURROGATE
    )
    if SURROGATE == PPO or SURROGATE == CISPO or SURROGATE == CLIP_COV:
        b_low += times * count(low)
        b_high += times * count(high)
    if SURROGATE == PPO:
        b_dual += times * count(dual)
    if SELECTS:
        b_chosen += times * count(chosen)
    _clips, _taus, _covariance_coef, kl_coef, floor, cap = numbers
    scale = weight
    if CORRECTION != UNCORRECTED:
        if CORRECTION < SEQUENCE_TRUNCATE:
            z, _moves = log_ratio(old, correction)
            correction = tl.where(keep, sampler_weight(tl.exp(z), floor, cap, CORRECTION == TOKEN_MASK), 0)
        scale = weight * correction
        b_correction += times * tl.sum(correction, axis=1)
        b_passed += times * count(correction != 0)
    if LEVEL == 0:
        direct += moves * slope
    total, direct, slope = scale * value, scale * direct, scale * slope
    if KL != KL_NONE:
        kl, kl_slope = kl_term(logprob, ref, KL)
        total += weight * kl_coef * kl
        direct += weight * kl_coef * kl_slope
        b_kl += times * tl.sum(kl, axis=1)
    b_loss += tl.sum(total, axis=1)
    sums = (b_loss, b_ratio, b_x, b_kl, b_correction, b_kept, b_low, b_high, b_dual, b_passed, b_chosen)
    return direct, slope, sums


@triton.jit
def store_sums(
    partial,
    sums,
    sequences_with_any,
    SURROGATE: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    SELECTS: tl.constexpr,
):
    """This program's sums, in the order of the loss and METRICS; only those that can be anything are added up."""
    b_loss, b_ratio, b_x, b_kl, b_correction, b_kept, b_low, b_high, b_dual, b_passed, b_chosen = sums
    acc: tl.constexpr = b_loss.dtype
    programs = tl.num_programs(0).to(tl.int64)
    partial += tl.program_id(0)
    kept = tl.sum(b_kept, axis=0).to(acc)
    none = kept * 0
    low, high, dual, kl, correction, masked, chosen = none, none, none, none, kept, none, none
    if SURROGATE == PPO or SURROGATE == CISPO or SURROGATE == CLIP_COV:
        low = tl.sum(b_low, axis=0).to(acc)
        high = tl.sum(b_high, axis=0).to(acc)
    if SURROGATE == PPO:
        dual = tl.sum(b_dual, axis=0).to(acc)
    if KL != KL_NONE:
        kl = tl.sum(b_kl, axis=0)
    if CORRECTION != UNCORRECTED:
        correction = tl.sum(b_correction, axis=0)
        if CORRECTION == TOKEN_MASK or CORRECTION == SEQUENCE_MASK:
            masked = kept - tl.sum(b_passed, axis=0).to(acc)
    if SELECTS:
        chosen = tl.sum(b_chosen, axis=0).to(acc)
    tl.store(partial, tl.sum(b_loss, axis=0))
    tl.store(partial + programs, kept)
    tl.store(partial + 2 * programs, sequences_with_any)
    tl.store(partial + 3 * programs, tl.sum(b_ratio, axis=0))
    tl.store(partial + 4 * programs, tl.sum(b_x, axis=0))
    tl.store(partial + 5 * programs, low)
    tl.store(partial + 6 * programs, high)
    tl.store(partial + 7 * programs, dual)
    tl.store(partial + 8 * programs, kl)
    tl.store(partial + 9 * programs, correction)
    tl.store(partial + 10 * programs, masked)
    tl.store(partial + 11 * programs, chosen)
