"""Whether the sampler and the trainer still agree on the log-probability of the tokens that were sampled."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Drift:
    """How far a sampler's log-probabilities are from the trainer's, over the tokens that count.

    Attributes:
        tokens: how many there are.
        mean_gap: mean |trainer - sampler|, in nats.
        max_gap: largest |trainer - sampler|, in nats.
        kl: mean of `rho - 1 - log rho` with `rho = exp(trainer - sampler)`, the k3 estimate of KL(sampler || trainer)
            (Schulman, "Approximating KL divergence", 2020), in nats.
        effective: effective sample size of the ratios as a share, `(sum rho)^2 / (T sum rho^2)`, from 1 / T to 1.
        warning: what drifted, with numbers; empty where nothing did.
    """

    tokens: int
    mean_gap: float
    max_gap: float
    kl: float
    effective: float
    warning: str


def measure_drift(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    weights: Tensor,
    *,
    max_mean_gap: float = 0.05,
    min_effective: float = 0.9,
) -> Drift:
    """Compare the two; both must be at the sampling temperature and, token by token, under the same weights.

    The usual causes of a warning: the sampler has earlier weights than the trainer believes, computed with caches of
    earlier weights, reports log-probabilities before temperature or top-p, or runs in a coarser dtype.

    Args:
        trainer_logprobs: [T] in nats.
        sampler_logprobs: [T] in nats, as the engine reported them.
        weights: [T]; tokens of weight 0 do not count, and their log-probabilities may be anything.
        max_mean_gap: `mean_gap` above which there is a warning, in nats.
        min_effective: `effective` below which there is a warning, from 0 to 1.

    Returns:
        The comparison, in float64; zeros and an effective share of 1 where no token counts.

    Raises:
        ValueError: shapes differ, or a token that counts has a log-probability that is not finite.
    """
    if not trainer_logprobs.shape == sampler_logprobs.shape == weights.shape or weights.ndim != 1:
        shapes = [tuple(tensor.shape) for tensor in (trainer_logprobs, sampler_logprobs, weights)]
        raise ValueError(f"trainer_logprobs, sampler_logprobs and weights are {shapes}; allowed: [T] each")
    counts = weights != 0
    trainer, sampler = trainer_logprobs[counts].detach().double(), sampler_logprobs[counts].detach().double()
    for name, values in (("trainer_logprobs", trainer), ("sampler_logprobs", sampler)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} of a token with weight is not finite; allowed: finite where the weight is not 0")
    tokens = len(trainer)
    if tokens == 0:
        return Drift(0, 0.0, 0.0, 0.0, 1.0, "")
    difference = trainer - sampler
    mean_gap, max_gap = float(difference.abs().mean()), float(difference.abs().max())
    kl = float((torch.expm1(difference) - difference).mean())
    # Scaled by the largest ratio, so that none overflows; the scale cancels.
    ratio = (difference - difference.max()).exp()
    effective = float(ratio.sum() ** 2 / (tokens * ratio.square().sum()))
    found = []
    if mean_gap > max_mean_gap:
        found.append(f"mean |difference| is {mean_gap:.4g} nats (allowed: {max_mean_gap:g}), at most {max_gap:.4g}")
    if effective < min_effective:
        found.append(f"effective sample size is {effective:.1%} of {tokens} tokens (allowed: {min_effective:.0%})")
    warning = "sampler and trainer drift apart: " + "; ".join(found) if found else ""
    return Drift(tokens, mean_gap, max_gap, kl, effective, warning)
