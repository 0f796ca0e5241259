"""Policy losses in Triton with an option on whole sequences: a program goes through one sequence two or three times.

What it reads again is in the cache: a sequence of a thousand tokens has 12 KB in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v05.kernels.policy_loss.triton_blocks import load_block, load_kept, load_tokens, load_weights, store_block
from v05.kernels.policy_loss.triton_terms import (
    BOUND,
    CISPO,
    GPG,
    KL_COV,
    KL_NONE,
    PPO,
    SAPO,
    SEQUENCE_MASK,
    SEQUENCE_TRUNCATE,
    UNCORRECTED,
    add_terms,
    clamped,
    count,
    log_ratio,
    no_sums,
    numbers_in,
    sampler_weight,
    store_sums,
)


@triton.jit
def places_in(ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The places 0 to BLOCK_T of a block that may begin anywhere, a row a thread, so that threads side by side read
    side by side."""
    return tl.arange(0, ROWS)[:, None] + ROWS * tl.arange(0, BLOCK_T // ROWS)[None, :]


@triton.jit
def shared_of(
    arrays,
    numbers,
    begin,
    end,
    LEVEL: tl.constexpr,
    CORRECTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Of one sequence: its unmasked tokens, the weight of all, their mean log-ratio, and the sampler's weight."""
    logprobs, old_logprobs, weights, _ref_logprobs, sampler_logprobs, _selected = arrays
    acc: tl.constexpr = logprobs.dtype.element_ty
    o_place = places_in(ROWS, BLOCK_T)
    b_kept = tl.zeros([ROWS], tl.float32)
    b_weight = tl.zeros([ROWS], tl.float64)
    b_x = b_weight
    b_z = b_weight
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for RAGGED in tl.static_range(2):  # the whole blocks, then what is left of one
        for start in range(whole if RAGGED else begin, end if RAGGED else whole, BLOCK_T):
            left = (end - start).to(tl.int32) if RAGGED else BLOCK_T
            weight, keep = load_weights(weights + start, o_place, left, RAGGED)
            old = load_block(old_logprobs + start, o_place, left, RAGGED)
            b_kept += count(keep)
            b_weight += tl.sum(weight, axis=1)
            if LEVEL == 1:
                x, _moves = log_ratio(load_block(logprobs + start, o_place, left, RAGGED), old)
                b_x += tl.sum(tl.where(keep, x, 0), axis=1)
            if CORRECTION >= SEQUENCE_TRUNCATE:
                z, _moves = log_ratio(old, load_block(sampler_logprobs + start, o_place, left, RAGGED))
                b_z += tl.sum(tl.where(keep, z, 0), axis=1)
    kept = tl.sum(b_kept, axis=0)
    mean = tl.sum(b_x.to(acc), axis=0) / tl.maximum(kept, 1)
    correction = kept
    if CORRECTION >= SEQUENCE_TRUNCATE:
        ratio = tl.exp(clamped(tl.sum(b_z.to(acc), axis=0), -BOUND, BOUND))
        _clips, _taus, _covariance_coef, _kl_coef, floor, cap = numbers
        correction = sampler_weight(ratio, floor, cap, CORRECTION == SEQUENCE_MASK)
    return kept, tl.sum(b_weight.to(acc), axis=0), mean, correction


@triton.jit
def add_alike(shared, advantage, numbers, sums, SURROGATE: tl.constexpr, CORRECTION: tl.constexpr):
    """Adds a sequence whose tokens differ by weight alone, as one for all; returns the derivative by the log-ratio."""
    kept, weight, mean, correction = shared
    one = tl.zeros([1, 1], mean.dtype)
    keep = one + kept > 0
    ratio = tl.exp(one + mean)
    advantage = tl.where(keep, advantage, 0)
    given = (one + weight, keep, one + mean, one, advantage, ratio, keep, tl.where(keep, correction, 0), one)
    _direct, slope, sums = add_terms(given, kept, numbers, sums, SURROGATE, 1, KL_NONE, CORRECTION, False)
    return tl.sum(tl.sum(slope, axis=1), axis=0), sums


@triton.jit
def add_tokens(
    arrays,
    advantages,
    gradient,
    shared,
    numbers,
    sums,
    sequence,
    begin,
    end,
    SURROGATE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SELECTS: tl.constexpr,
    STORES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Adds the tokens of a sequence, and may store their own gradient; returns the derivative by the log-ratio."""
    _kept, _weight, mean, of_sampler = shared
    o_place = places_in(ROWS, BLOCK_T)
    b_slope = tl.zeros([ROWS], tl.float64)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for RAGGED in tl.static_range(2):  # the whole blocks, then what is left of one
        for start in range(whole if RAGGED else begin, end if RAGGED else whole, BLOCK_T):
            left = (end - start).to(tl.int32) if RAGGED else BLOCK_T
            weight, keep, logprob, old, ref, chosen = load_tokens(arrays, start, o_place, left, RAGGED)
            if PER_TOKEN:
                advantage = load_kept(advantages + start, o_place, left, keep, RAGGED)
            else:
                advantage = tl.where(keep, tl.load(advantages + sequence), 0)
            correction = logprob
            if CORRECTION >= SEQUENCE_TRUNCATE:
                correction = tl.where(keep, of_sampler, 0)
            elif CORRECTION != UNCORRECTED:
                correction = load_kept(arrays[4] + start, o_place, left, keep, RAGGED)
            ratio = tl.where(keep, tl.exp(mean), 1)
            given = (weight, keep, logprob, old, advantage, ratio, chosen, correction, ref)
            direct, slope, sums = add_terms(given, 1, numbers, sums, SURROGATE, LEVEL, KL, CORRECTION, SELECTS)
            b_slope += tl.sum(slope, axis=1)
            if STORES:
                store_block(gradient + start, direct, o_place, left, RAGGED)
    return tl.sum(b_slope.to(mean.dtype), axis=0), sums


@triton.jit
def share(arrays, gradient, part, begin, end, ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Gives each token of a sequence its part of the derivative by the log-ratio, beside its own gradient if any."""
    logprobs, old_logprobs, weights, _ref_logprobs, _sampler_logprobs, _selected = arrays
    o_place = places_in(ROWS, BLOCK_T)
    whole = begin + (end - begin) // BLOCK_T * BLOCK_T
    for RAGGED in tl.static_range(2):  # the whole blocks, then what is left of one
        for start in range(whole if RAGGED else begin, end if RAGGED else whole, BLOCK_T):
            left = (end - start).to(tl.int32) if RAGGED else BLOCK_T
            _weight, keep = load_weights(weights + start, o_place, left, RAGGED)
            old = load_block(old_logprobs + start, o_place, left, RAGGED)
            _x, moves = log_ratio(load_block(logprobs + start, o_place, left, RAGGED), old)
            total = tl.where(keep, moves * part, 0)
            if ADDS:
                total += load_block(gradient + start, o_place, left, RAGGED)
            store_block(gradient + start, total, o_place, left, RAGGED)


@triton.jit(do_not_specialize=["sequences", "each"])
def sequence_kernel(
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
    ROWS: tl.constexpr,
):
    """Loss terms and gradient of `each` sequences."""
    acc: tl.constexpr = gradient.dtype.element_ty
    SHARES: tl.constexpr = LEVEL == 1 and SURROGATE != CISPO and SURROGATE != GPG
    OWN: tl.constexpr = KL != KL_NONE or SURROGATE == KL_COV  # a gradient of the token's own, beside its share
    BY_TOKEN: tl.constexpr = (
        PER_TOKEN or SELECTS or OWN or (CORRECTION != UNCORRECTED and CORRECTION < SEQUENCE_TRUNCATE)
    )
    ALIKE: tl.constexpr = LEVEL == 1 and not BY_TOKEN and (SURROGATE == PPO or SURROGATE == SAPO)
    arrays = (logprobs, old_logprobs, weights, ref_logprobs, sampler_logprobs, selected)
    numbers = numbers_in(acc, clip_low, clip_high, dual_clip, tau_pos, tau_neg, covariance_coef, kl_coef, floor, cap)
    sums = no_sums(acc, 1 if ALIKE else ROWS)
    with_any = tl.full([], 0, acc)
    first = tl.program_id(0).to(tl.int64) * each
    for i in range(first, tl.minimum(first + each, sequences)):
        begin = tl.load(offsets + i)
        end = tl.load(offsets + i + 1)
        shared = shared_of(arrays, numbers, begin, end, LEVEL, CORRECTION, ROWS, 2 * BLOCK_T)
        with_any += tl.where(shared[0] > 0, 1, 0)
        if ALIKE:
            slope, sums = add_alike(shared, tl.load(advantages + i), numbers, sums, SURROGATE, CORRECTION)
        else:
            slope, sums = add_tokens(
                *(arrays, advantages, gradient, shared, numbers, sums, i, begin, end),
                *(SURROGATE, LEVEL, KL, CORRECTION, PER_TOKEN, SELECTS, OWN or not SHARES, ROWS, BLOCK_T),
            )
        if SHARES:
            if OWN:
                tl.debug_barrier()  # another thread may have stored it
            share(arrays, gradient, slope / tl.maximum(shared[0], 1), begin, end, OWN, ROWS, 2 * BLOCK_T)
    store_sums(partial, sums, with_any, SURROGATE, KL, CORRECTION, SELECTS)
