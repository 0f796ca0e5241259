"""TRL's losses straight from hidden states, through `v05.kernels.linear_policy_loss`: no log-probs are kept."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from v05.integrations.trl.config import V05Config
from v05.integrations.trl.loss import CLIPPED, Divisors, kind_of, packed_advantages, row_offsets, token_weights, why_not
from v05.kernels import linear_policy_loss
from v05.kernels.policy_loss.op import PolicyLoss

# What a model may do to its logits beside the head, by the names of configurations; None or 1 is nothing.
SCALES: Final = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class States(NamedTuple):
    """Rows as the head sees them: `hidden` `[B, L, H]` before each completion token, `targets` `[B, L]`, `weight`
    `[V, H]` and `bias` `[V]` or None of the head, `old` `[B, L]` or None where the policy is the old one, `mask`
    `[B, L]` bool, `advantages` `[B, 1]` or `[B, L]`, `factor` as in `v05.integrations.trl.loss.Scored`.
    """

    hidden: Tensor
    targets: Tensor
    weight: Tensor
    bias: Tensor | None
    old: Tensor | None
    mask: Tensor
    advantages: Tensor
    factor: Tensor | None


def why_not_linear(args: V05Config, model_config: Any, mixture_of_experts: bool, sharded: bool) -> str | None:
    """Return why `linear_policy_loss` cannot compute the loss that `args` ask for, or None where it can.

    Args:
        args: the options.
        model_config: of the language model.
        mixture_of_experts: whether an auxiliary loss belongs to the model.
        sharded: whether a process holds only a part of the parameters.
    """
    reasons = {
        "beta is not 0, and a KL needs log-probs": args.beta != 0.0,
        "loss_type 'vespo' needs log-probs": args.loss_type == "vespo",
        "top_entropy_quantile needs entropies": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold needs log-probs": args.off_policy_mask_threshold is not None,
        "the model has an auxiliary loss": mixture_of_experts,
        "parameters are sharded": sharded,
    }
    scaled = [name for name in SCALES if getattr(model_config, name, None) not in (None, 1.0)]
    reasons |= {f"the model's {name} changes logits": True for name in scaled}
    return why_not(args) or next((reason for reason, applies in reasons.items() if applies), None)


def linear_loss_of(args: V05Config, states: States, by: Divisors) -> PolicyLoss:
    """Return the loss of one step: TRL's value and gradient.

    Where the policy is the old one its log-probs are not known beforehand. The ratio is 1 then, so the gradient is that
    of REINFORCE, and the value follows from the advantages alone.
    """
    mask = states.mask
    weights = token_weights(args, mask, by)
    offsets = row_offsets(mask)
    advantages, offsets = packed_advantages(mask, states.advantages, states.factor, offsets)
    options, old = kind_of(args), torch.zeros_like(weights) if states.old is None else states.old
    if states.old is None:
        options = dict(surrogate="gpg")
    result = linear_policy_loss(
        states.hidden[mask],
        states.weight,
        states.targets[mask],
        old[mask],
        advantages,
        weights[mask],
        sequence_offsets=offsets,
        bias=states.bias,
        temperature=args.temperature,
        **options,
    )
    if states.old is not None or args.loss_type == "cispo":
        return result
    value = -(weights * states.advantages * (1 if states.factor is None else states.factor)).sum(1)
    if args.loss_type not in CLIPPED:  # sapo: 4 / tau times a sigmoid at 0
        positive = states.advantages[:, 0] > 0
        value = value * 2 / torch.where(positive, args.sapo_temperature_pos, args.sapo_temperature_neg)
    return result._replace(loss=result.loss - result.loss.detach() + value.sum())


def linear_metrics(args: V05Config, sums: dict[str, Tensor]) -> dict[str, float]:
    """Return what TRL logs of a step, as means over tokens, from the kernel's sums over all processes."""
    means = {name: float(value / sums["tokens"].clamp(min=1)) for name, value in sums.items()}
    found = {"entropy": means["entropy_sum"]}
    if args.loss_type in CLIPPED:
        low, high = means["clipped_low"], means["clipped_high"]
        found |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    elif args.loss_type == "cispo":
        found["cispo_clip_ratio"] = means["clipped_high"]
    return found
