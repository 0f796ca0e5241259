"""Policy losses in plain differentiable torch: the textbook equations, the oracle of every kernel's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.policy_loss.options import LOG_RATIO_BOUND, Correction, Inputs, Kinds, Kl, Numbers, Surrogate


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b, and 0 without gradient where both are the same infinity."""
    same = (a == b) & a.isinf()
    return torch.where(same, 0, a) - torch.where(same, 0, b)


def log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """a - b, cut off at the bound; no gradient beyond it."""
    return difference(a, b).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def surrogate_loss(
    kind: int, logprobs: Tensor, x: Tensor, ratio: Tensor, advantages: Tensor, selected: Tensor, by: Numbers
) -> Tensor:
    """The loss `[T]` of each token; `x` is its own log-ratio, `ratio` that of the level."""
    clipped = ratio.clamp(1 - by.clip_low, 1 + by.clip_high)
    if kind == Surrogate.GPG:
        return -advantages * logprobs
    if kind == Surrogate.CISPO:
        return -clipped.detach() * advantages * logprobs
    if kind == Surrogate.SAPO:
        tau = torch.full_like(ratio, by.tau_neg).masked_fill(advantages > 0, by.tau_pos)
        return -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1))
    if kind == Surrogate.KL_COV:
        return -advantages * ratio + torch.where(selected, by.covariance_coef * x.abs(), 0)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if kind == Surrogate.CLIP_COV:
        return torch.where(selected, 0, loss)
    dual = -advantages * (by.dual_clip if by.dual_clip < float("inf") else torch.finfo(ratio.dtype).max)
    return torch.where(advantages < 0, torch.minimum(loss, dual), loss)


def kl_loss(kind: int, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimate `[T]` of KL(policy || reference), with the gradient of its value, or of k2 for a +."""
    if kind in (Kl.K1_PLUS, Kl.K3_PLUS):
        value = kl_loss(Kl.K1 if kind == Kl.K1_PLUS else Kl.K3, logprobs, ref_logprobs)
        slope = kl_loss(Kl.K2, logprobs, ref_logprobs)
        return value.detach() + slope - slope.detach()
    y = difference(ref_logprobs, logprobs)
    if kind == Kl.K1:
        return -y
    if kind == Kl.K2:
        return y.square() / 2
    y = y.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return y.exp() - y - 1


def sampler_weights(kind: int, z: Tensor, ids: Tensor, sequences: int, by: Numbers) -> Tensor:
    """The detached weight `[T]` of each token, from z `[T]`: old policy against sampler, 0 where masked."""
    if kind in (Correction.SEQUENCE_TRUNCATE, Correction.SEQUENCE_MASK):
        z = segments.segment_sum(z, ids, sequences).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)[ids]
    ratio = z.exp()
    if kind in (Correction.TOKEN_MASK, Correction.SEQUENCE_MASK):
        return torch.where((ratio >= by.sampler_floor) & (ratio <= by.sampler_cap), ratio, 0)
    return ratio.clamp(max=by.sampler_cap)


def clip_counts(kind: int, ratio: Tensor, advantages: Tensor, keep: Tensor, by: Numbers) -> list[Tensor]:
    """How many tokens' ratios were held back by the low, the high and the dual bound."""
    low, high = keep & (ratio < 1 - by.clip_low), keep & (ratio > 1 + by.clip_high)
    dual = keep & (ratio > by.dual_clip) & (advantages < 0)
    if kind in (Surrogate.PPO, Surrogate.CLIP_COV):
        low, high = low & (advantages < 0), high & (advantages > 0)
    elif kind != Surrogate.CISPO:
        low, high = torch.zeros_like(low), torch.zeros_like(high)
    return [low.sum(), high.sum(), dual.sum()]


def policy_loss(given: Inputs, kinds: Kinds, by: Numbers) -> tuple[Tensor, Tensor]:
    """The loss, differentiable in logprobs by autograd, and the metrics `[11]` in the order of `METRICS`."""
    logprobs, old_logprobs, advantages, weights, offsets, ref_logprobs, sampler_logprobs, selected = given
    tokens, sequences = given.tokens, given.sequences
    ids = segments.segment_ids(offsets, tokens)
    keep = weights != 0

    def clean(values: Tensor) -> Tensor:
        return torch.where(keep, values, 0)

    logprobs, old_logprobs = clean(logprobs), clean(old_logprobs)
    advantages = clean(advantages if given.per_token else advantages[ids])
    chosen = keep & selected if selected is not None else torch.zeros_like(keep)
    x = log_ratio(logprobs, old_logprobs)
    kept = segments.segment_sum(keep.to(x.dtype), ids, sequences)
    level_x = x
    if kinds.level == 1:
        level_x = (segments.segment_sum(x, ids, sequences) / kept.clamp(min=1))[ids]
    ratio = level_x.exp()
    losses = surrogate_loss(kinds.surrogate, logprobs, x, ratio, advantages, chosen, by)
    correction = keep.to(x.dtype)
    if sampler_logprobs is not None:
        z = log_ratio(old_logprobs, clean(sampler_logprobs))
        correction = clean(sampler_weights(kinds.correction, z, ids, sequences, by))
        losses = correction * losses
    kl = torch.zeros_like(losses)
    if ref_logprobs is not None:
        kl = kl_loss(kinds.kl, logprobs, clean(ref_logprobs))
        losses = losses + by.kl_coef * kl
    masked = (keep & (correction == 0)).sum() * (kinds.correction in (Correction.TOKEN_MASK, Correction.SEQUENCE_MASK))
    metrics = [
        keep.sum(),
        (kept > 0).sum(),
        clean(ratio).sum(),
        x.sum(),
        *clip_counts(kinds.surrogate, ratio, advantages, keep, by),
        kl.sum(),
        correction.sum(),
        masked,
        chosen.sum(),
    ]
    return (weights * losses).sum(), torch.stack([value.detach().to(x.dtype) for value in metrics])
