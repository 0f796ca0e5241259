"""TRL's losses straight from hidden states, through `v05.kernels.linear_policy_loss`: no log-probs are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.head import Places, packed, places_of, through_head
from v05.integrations.trl.loss import CLIPPED, Divisors, kind_of, packed_advantages, token_weights, why_not
from v05.integrations.trl.rollouts import learnt_from
from v05.kernels import linear_policy_loss
from v05.kernels.policy_loss.op import PolicyLoss


class Tokens(NamedTuple):
    """What a step learns from, packed: T tokens of its rows, and `where` they are.

    `old` `[T]`, or None where the policy is the old one; `advantages` and `offsets` as `policy_loss` takes them;
    `weights` `[T]` float32; `value`, what the loss is where that of REINFORCE has another value, or None.
    """

    where: Places
    old: Tensor | None
    advantages: Tensor
    offsets: Tensor
    weights: Tensor
    value: Tensor | None


def why_not_linear(args: V05Config) -> str | None:
    """Return why `linear_policy_loss` cannot compute the loss that `args` ask for, or None where it can."""
    reasons = {
        "beta is not 0, and a KL needs log-probs": args.beta != 0.0,
        "loss_type 'vespo' needs log-probs": args.loss_type == "vespo",
        "top_entropy_quantile needs entropies": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold needs log-probs": args.off_policy_mask_threshold is not None,
    }
    return why_not(args) or next((reason for reason, applies in reasons.items() if applies), None)


def packed_tokens(args: V05Config, inputs: dict[str, Tensor], factor: Tensor | None, by: Divisors) -> Tokens:
    """Return the tokens of a step; a device is waited for, so this comes before the model's forward.

    Where the policy is the old one its log-probs are not known beforehand, but the value of the loss is: the ratio is 1
    then, so it follows from the advantages alone.

    Args:
        args: the choices.
        inputs: TRL's batch.
        factor: as in `v05.integrations.trl.loss.Scored`.
        by: see `Divisors`.
    """
    mask, targets, old = learnt_from(inputs).bool(), inputs["completion_ids"], inputs.get("old_per_token_logps")
    each = inputs["advantages"] if inputs["advantages"].dim() == 2 else inputs["advantages"].unsqueeze(1)
    weights, places = token_weights(args, mask, by), places_of(mask)
    advantages, offsets = packed_advantages(mask, each, factor, places)
    value = None
    if old is None and args.loss_type != "cispo":
        value = -(weights * each * (1 if factor is None else factor)).sum(1)
        if args.loss_type not in CLIPPED:  # sapo: 4 / tau times a sigmoid at 0
            value = value * 2 / torch.where(each[:, 0] > 0, args.sapo_temperature_pos, args.sapo_temperature_neg)
        value = value.sum()
    old = None if old is None else packed(old, places)
    where = Places(places, mask.size(1), packed(targets, places))
    return Tokens(where, old, advantages, offsets, packed(weights, places), value)


def linear_loss_of(args: V05Config, hidden: Tensor, head: Any, tokens: Tokens) -> PolicyLoss:
    """Return the loss of one step: TRL's value and gradient.

    Where the policy is the old one, the gradient is that of REINFORCE.

    Args:
        args: the choices.
        hidden, head: as in `v05.integrations.trl.head.through_head`.
        tokens: what is learnt from.
    """
    options, old = kind_of(args), tokens.old
    if old is None:
        options, old = dict(surrogate="gpg"), torch.zeros_like(tokens.weights)
    given = (old, tokens.advantages, tokens.weights)
    options = dict(options, sequence_offsets=tokens.offsets)
    result = through_head(args, linear_policy_loss, hidden, head, tokens.where, *given, **options)
    if tokens.value is None:
        return result
    return result._replace(loss=result.loss - result.loss.detach() + tokens.value)


def linear_metrics(args: V05Config, names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Return what TRL logs of a step, as means over tokens, from the kernel's named sums over all processes."""
    means = dict(zip(names, (sums / sums[names.index("tokens")].clamp(min=1)).tolist(), strict=True))
    found = {"entropy": means["entropy_sum"]}
    if args.loss_type in CLIPPED:
        low, high = means["clipped_low"], means["clipped_high"]
        found |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    elif args.loss_type == "cispo":
        found["cispo_clip_ratio"] = means["clipped_high"]
    return found
