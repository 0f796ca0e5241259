"""TRL's losses as choices of `v05.kernels.policy_loss`: kind of surrogate, weight of each token, one advantage each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.integrations.trl.config import V05Config
from v05.integrations.trl.head import packed, places_of
from v05.kernels import policy_loss
from v05.kernels.policy_loss.op import PolicyLoss
from v05.kernels.policy_loss.options import HIGHEST_TAU

ROW_MEANS: Final = ("grpo", "sapo", "dr_grpo", "luspo")  # divide by rows
TOKEN_MEANS: Final = ("dapo", "cispo", "vespo")  # divide by the tokens of the whole batch
CLIPPED: Final = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # with the surrogate of PPO


class Scored(NamedTuple):
    """A padded batch under the policy in training: B rows of L completion tokens.

    `logprobs` `[B, L]` with gradient; `old`, `ref` the same under the old policy and the reference (or None); `mask`
    `[B, L]` bool, what is learnt from; `advantages` `[B, 1]` or `[B, L]`; `factor`, what TRL multiplies a token's
    surrogate by (`[B, 1]` or `[B, L]`, 0 or above: masks by entropy or by drift, the sampler's ratio), or None.
    """

    logprobs: Tensor
    old: Tensor
    ref: Tensor | None
    mask: Tensor
    advantages: Tensor
    factor: Tensor | None

    def log_ratio(self, level: str) -> Tensor:
        """Return `[B, L]`, or `[B, 1]` for the level of sequences; 0 where masked."""
        gap = torch.where(self.mask, self.logprobs - self.old, 0)
        return gap if level == "token" else gap.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)


class Divisors(NamedTuple):
    """What sums over one step are divided by, so that the steps and processes of an update add up to its mean.

    `rows`: of a mean over rows. `tokens`: of a mean over all tokens. `steps`: of a mean within a step (bnpo). `share`:
    what a piece of a step has of its tokens.
    """

    rows: float
    tokens: Tensor | float
    steps: float
    share: Tensor | float = 1.0


def epsilon_high(args: V05Config) -> float:
    """Return TRL's upper bound, which is the lower one where it is not given."""
    return args.epsilon if args.epsilon_high is None else args.epsilon_high


def why_not(args: V05Config) -> str | None:
    """Return why `policy_loss` cannot compute the loss that `args` ask for, or None where it can."""
    high = epsilon_high(args)
    if args.entropy_coef != 0.0 or args.use_adaptive_entropy:
        return "entropy_coef and use_adaptive_entropy add an entropy bonus that TRL steers itself"
    if args.loss_type not in (*ROW_MEANS, *TOKEN_MEANS, "bnpo"):
        return f"loss_type {args.loss_type!r} is not known to it"
    if args.loss_type == "cispo" and high < 1:
        return f"loss_type 'cispo' caps the ratio at epsilon_high itself, which is {high}, below 1"
    if args.loss_type in CLIPPED and args.delta is not None and not (args.delta > 1 and args.delta >= 1 + high):
        return f"delta is {args.delta}, below 1 + epsilon_high"
    taus = (args.sapo_temperature_pos, args.sapo_temperature_neg)
    if args.loss_type == "sapo" and not all(1e-6 <= tau <= HIGHEST_TAU for tau in taus):
        return f"the temperatures of sapo are {taus}, outside 1e-6 to {HIGHEST_TAU:g}"
    return None


def kind_of(args: V05Config) -> dict[str, Any]:
    """Return the options of `policy_loss` that stand for TRL's `loss_type` and bounds, KL and masks apart."""
    high = epsilon_high(args)
    if args.loss_type == "vespo":
        return dict(surrogate="gpg")  # its weight of the ratio is a constant, part of the advantage
    level = dict(level=args.importance_sampling_level)
    if args.loss_type == "cispo":  # its bound is the ratio itself, and there is no lower one
        return dict(surrogate="cispo", clip_low=1.0, clip_high=high - 1, **level)
    if args.loss_type == "sapo":
        taus = dict(sapo_tau_pos=args.sapo_temperature_pos, sapo_tau_neg=args.sapo_temperature_neg)
        return dict(surrogate="sapo", **taus, **level)
    return dict(surrogate="ppo", clip_low=args.epsilon, clip_high=high, dual_clip=args.delta, **level)


def token_weights(args: V05Config, mask: Tensor, by: Divisors) -> Tensor:
    """Return what each token of `mask` [B, L] counts in the loss, [B, L] float32; 0 where masked."""
    kept = mask.float()
    if args.loss_type in ("grpo", "sapo"):
        return kept / kept.sum(1, keepdim=True).clamp(min=1) / by.rows
    if args.loss_type == "dr_grpo":
        return kept / (by.rows * args.max_completion_length)
    if args.loss_type == "luspo":
        return kept / by.rows
    if args.loss_type == "bnpo":
        return kept * by.share / kept.sum().clamp(min=1) / by.steps
    return kept / by.tokens


def row_offsets(mask: Tensor) -> Tensor:
    """Return where the unmasked tokens of each row of `mask` [B, L] begin and end, packed: [B + 1] int64."""
    return offsets_of(mask.sum(1))


def bias_corrected_kl(scored: Scored, level: str) -> Tensor:
    """Return k3 times the ratio, both with gradient, [B, L]; 0 where masked (arXiv 2512.02556)."""
    assert scored.ref is not None
    gap = torch.where(scored.mask, scored.ref - scored.logprobs, 0)
    return torch.where(scored.mask, (gap.exp() - gap - 1) * scored.log_ratio(level).exp(), 0)


def packed_advantages(mask: Tensor, advantages: Tensor, factor: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return advantages and offsets of the tokens at the places, as `policy_loss` takes them: `[N]`, or `[T]`, of each.

    A factor of 0 or more on a token's surrogate is one on its advantage. As many advantages as sequences would be read
    as one per sequence, so an empty sequence goes behind where T is N.
    """
    offsets = row_offsets(mask)
    if factor is None and advantages.shape[1] == 1:
        return advantages[:, 0], offsets
    tokens = packed((advantages * (1 if factor is None else factor)).expand(mask.shape), places)
    if len(tokens) == len(offsets) - 1:
        offsets = torch.cat([offsets, offsets[-1:]])
    return tokens, offsets


def loss_of(args: V05Config, scored: Scored, by: Divisors) -> tuple[PolicyLoss, Tensor | None]:
    """Return the loss of one step, and the KL of each token where it was computed beside the kernel.

    Args:
        args: the choices.
        scored: the step's rows.
        by: see `Divisors`.

    Returns:
        The loss, whose value and gradient are those of TRL's `_compute_loss` on the same rows, and the KL [B, L] or
        None.
    """
    mask, places = scored.mask, places_of(scored.mask)
    weights = token_weights(args, mask, by)
    advantages, offsets = packed_advantages(mask, scored.advantages, scored.factor, places)
    options: Mapping[str, Any] = kind_of(args)
    own_kl = scored.ref is not None and args.use_bias_correction_kl
    if scored.ref is not None and not own_kl:
        options = dict(options, kl="k3", kl_coef=args.beta, ref_logprobs=packed(scored.ref, places))
    logprobs, old, kept = (packed(values, places) for values in (scored.logprobs, scored.old, weights))
    result = policy_loss(logprobs, old, advantages, kept, sequence_offsets=offsets, **options)
    if not own_kl:
        return result, None
    kl = bias_corrected_kl(scored, args.importance_sampling_level)
    return result._replace(loss=result.loss + args.beta * (weights * kl).sum()), kl.detach()
