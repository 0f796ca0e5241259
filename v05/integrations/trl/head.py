"""A language model's output layer as TRL applies it to the states of completions, with an op of v05's in its place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from v05.integrations.trl.config import V05Config

Found = TypeVar("Found")
# What a model may do to its logits beside the head, by the names of configurations; None or 1 is nothing.
SCALES: Final = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class Places(NamedTuple):
    """Where T of B * `length` completion tokens are, and what they are: `places` `[T]` int64, `targets` `[T]` int64."""

    places: Tensor
    length: int
    targets: Tensor


def places_of(mask: Tensor) -> Tensor:
    """Return where the unmasked tokens of `mask` [B, L] are among its B * L, [T] int64; a device is waited for."""
    return mask.flatten().nonzero().squeeze(1)


def packed(values: Tensor, places: Tensor) -> Tensor:
    """Return `values` [B, L] at the places, [T]."""
    return values.reshape(-1).index_select(0, places)


def why_not_head(model_config: Any, mixture_of_experts: bool, split: bool, images: bool) -> str | None:
    """Return why no op can take the place of a model's output layer, or None where one can.

    Args:
        model_config: of the language model.
        mixture_of_experts: whether an auxiliary loss belongs to the model.
        split: whether a process may hold the model on several devices, or only a part of the output layer.
        images: whether the model takes them.
    """
    reasons = {
        "the model has an auxiliary loss": mixture_of_experts,
        "the model may be on several devices": split,
        "the model takes images": images,
    }
    scaled = [name for name in SCALES if getattr(model_config, name, None) not in (None, 1.0)]
    reasons |= {f"the model's {name} changes logits": True for name in scaled}
    return next((reason for reason, applies in reasons.items() if applies), None)


def through_head(
    args: V05Config, op: Callable[..., Found], hidden: Tensor, head: Any, where: Places, *given: Any, **options: Any
) -> Found:
    """Return `op(states, weight, targets, *given, bias=..., temperature=..., **options)`, in the dtypes of TRL's head.

    Args:
        args: the choices.
        op: `linear_logprob` or `linear_policy_loss`.
        hidden: last hidden states `[B, S, H]`, those of the completions last; each token is predicted from the state
            before it.
        head: the output layer, with a weight `[V, H]` and a bias `[V]` or None.
        where: the tokens.
        given, options: what else the op takes.
    """
    row, column = where.places // where.length, where.places % where.length
    before = (row + 1) * hidden.size(1) - where.length + column - 1
    states, weight, bias = hidden.flatten(0, 1).index_select(0, before), head.weight, head.bias
    apart = args.cast_lm_head_to_fp32
    states = states.float() if apart else states
    if apart or not torch.is_autocast_enabled(states.device.type):
        weight, bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
    with torch.autocast(states.device.type, enabled=False) if apart else nullcontext():
        return op(states, weight, where.targets, *given, bias=bias, temperature=args.temperature, **options)
