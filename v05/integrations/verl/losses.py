"""`policy_loss` as verl's policy losses: padded tensors and its own settings in, one pass over packed tokens."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from v05.kernels import policy_loss, select_by_covariance
from v05.packing import Layout, token_weights


class Kind(NamedTuple):
    """A surrogate and the level of its ratio; `dual` takes verl's `clip_ratio_c` as the dual clip."""

    surrogate: str
    level: str = "token"
    dual: bool = False

    @property
    def by_covariance(self) -> bool:
        """Return whether some tokens are chosen by covariance."""
        return self.surrogate in ("clip_cov", "kl_cov")


LOSSES: Final = {
    "ppo": Kind("ppo", dual=True),
    "ppo_sequence": Kind("ppo", "sequence", dual=True),
    "gspo": Kind("ppo", "sequence"),
    "cispo": Kind("cispo"),
    "cispo_sequence": Kind("cispo", "sequence"),
    "sapo": Kind("sapo"),
    "sapo_sequence": Kind("sapo", "sequence"),
    "gpg": Kind("gpg"),
    "clip_cov": Kind("clip_cov"),
    "clip_cov_sequence": Kind("clip_cov", "sequence"),
    "kl_cov": Kind("kl_cov"),
    "kl_cov_sequence": Kind("kl_cov", "sequence"),
}
MODES: Final = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


class Packed(NamedTuple):
    """Unmasked tokens of a micro-batch, [T] each; rows without a token are left out of the offsets [N + 1]."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    offsets: Tensor


class Loss:
    """One policy loss, called as verl calls its own; `loss_agg_mode` is always honoured."""

    def __init__(self, name: str) -> None:
        """Take a name of `LOSSES`.

        Raises:
            ValueError: an unknown name.
        """
        if name not in LOSSES:
            raise ValueError(f"policy loss is {name!r}; allowed: {', '.join(LOSSES)}")
        self.name, self.kind = name, LOSSES[name]

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a micro-batch.

        Args:
            old_log_prob, log_prob: [B, L], in nats.
            advantages: [B, L].
            response_mask: [B, L]; what is masked counts for nothing, whatever it holds.
            loss_agg_mode: one of `MODES`, with verl's normalisers in `config.global_batch_info`.
            config: verl's actor configuration: `clip_ratio*`, `tau_*`, `policy_loss.*`, `global_batch_info`.
            rollout_is_weights: [B, L], at least 0: multiplies each token's loss.

        Returns:
            The loss, a scalar differentiable in `log_prob`, and metrics under verl's names.

        Raises:
            ValueError: the configuration is missing, or something in it is not allowed.
        """
        if config is None:
            raise ValueError("config is None; allowed: verl's actor configuration")
        layout = Layout.of(response_mask)
        offsets = _without_empty(layout)
        weights = token_weights(_ours(loss_agg_mode), offsets, divisor=_divisor(loss_agg_mode, layout, config))
        values = [layout.pack(padded) for padded in (log_prob, old_log_prob, advantages)]
        packed = Packed(values[0], values[1], values[2], weights, offsets)
        options = self._options(config)
        if self.kind.by_covariance:
            options["covariance_selected"] = self._selected(packed, config)
        if rollout_is_weights is not None:
            packed = _weighted(packed, layout.pack(rollout_is_weights).detach(), self.kind)
        loss, sums = policy_loss(*packed[:4], sequence_offsets=packed.offsets, **options)
        return loss, _metrics(sums)

    def _options(self, config: Any) -> dict[str, Any]:
        """Return the settings of `policy_loss` that verl's configuration has."""
        low, high = _clip(config)
        options: dict[str, Any] = dict(
            surrogate=self.kind.surrogate, level=self.kind.level, clip_low=low, clip_high=high
        )
        if self.kind.dual:
            options["dual_clip"] = _dual_clip(config.get("clip_ratio_c", 3.0))
        if self.kind.surrogate == "sapo":
            options |= dict(sapo_tau_pos=float(config.tau_pos), sapo_tau_neg=float(config.tau_neg))
        if self.kind.surrogate == "kl_cov":
            options["covariance_coef"] = float(config.policy_loss.ppo_kl_coef)
        return options

    def _selected(self, packed: Packed, config: Any) -> Tensor:
        """Return the tokens that are treated apart, [T] bool, chosen within the micro-batch as verl does."""
        section, clip = config.policy_loss, self.kind.surrogate == "clip_cov"
        low, high = _clip(config)
        return select_by_covariance(
            *packed[:4],
            sequence_offsets=packed.offsets,
            surrogate=self.kind.surrogate,
            fraction=float(section.clip_cov_ratio if clip else section.kl_cov_ratio),
            bounds=(float(section.clip_cov_lb), float(section.clip_cov_ub)),
            clip_low=low,
            clip_high=high,
        )


def _clip(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return float(config.clip_ratio if low is None else low), float(config.clip_ratio if high is None else high)


def _dual_clip(given: Any) -> float:
    if not (isinstance(given, Real) and 1 < float(given) < math.inf):
        raise ValueError(f"clip_ratio_c is {given!r}; allowed: a finite number above 1")
    return float(given)


def _without_empty(layout: Layout) -> Tensor:
    """Return offsets without empty rows: then as many tokens as sequences means one token each."""
    kept = layout.sequence_offsets[1:][layout.counts > 0]
    return torch.nn.functional.pad(kept, (1, 0))


def _ours(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"loss_agg_mode is {mode!r}; allowed: {', '.join(MODES)}")
    return "token-mean" if mode == "token-sum" else mode


def _divisor(mode: str, layout: Layout, config: Any) -> float:
    """Return what verl divides the sum by, its global normalisers first, this micro-batch's own without them."""
    info = config.get("global_batch_info", None) or {}
    tokens, sequences = info.get("batch_num_tokens"), info.get("global_batch_size")
    ranks = int(info.get("dp_size") or 1)
    needed = {"token-mean": ("batch_num_tokens", tokens), "token-sum": ("", 1)}.get(
        mode, ("global_batch_size", sequences)
    )
    if needed[1] is None and ranks > 1:
        raise ValueError(f"global_batch_info has no {needed[0]}; needed with dp_size {ranks}")
    if mode == "token-sum":
        divisor = 1.0
    elif mode == "token-mean":
        divisor = float(len(layout.positions) if tokens is None else tokens)
    else:
        divisor = float((layout.counts > 0).sum() if sequences is None else sequences)
    if mode == "seq-mean-token-sum-norm":
        divisor *= float(info.get("loss_scale_factor") or layout.shape[1])
    return max(divisor, 1.0) / ranks


def _weighted(packed: Packed, weights: Tensor, kind: Kind) -> Packed:
    """Return tokens whose loss is multiplied by `weights` [T].

    Surrogates are linear in a positive factor of the advantage, and there a weight of 0 leaves the token in its
    sequence's ratio; kl_cov alone has a term without advantage, and there a weight of 0 takes the token out.
    """
    if kind.surrogate == "kl_cov":
        return packed._replace(weights=packed.weights * weights)
    return packed._replace(advantages=packed.advantages * weights)


def _metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Return verl's names for shares of this micro-batch's tokens, waiting for the device once."""
    names = ("tokens", "clipped_low", "clipped_high", "dual_clipped", "log_ratio_sum", "covariance_selected")
    tokens, low, high, dual, ratio, selected = torch.stack([sums[name].detach().float() for name in names]).tolist()
    tokens = max(tokens, 1.0)
    return {
        "actor/pg_clipfrac": (low + high) / tokens,
        "actor/pg_clipfrac_lower": dual / tokens,
        "actor/ppo_kl": -ratio / tokens,
        "actor/covariance_selected": selected / tokens,
    }
