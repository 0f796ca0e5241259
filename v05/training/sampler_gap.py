"""How far the sampler's log-probabilities are from the trainer's: sums that combine, an update's metrics, a warning."""

import logging
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

LARGEST: Final = ("sampler_gap",)  # of `gap_sums`, what micro-batches and ranks combine by the maximum
FARTHEST: Final = 100.0  # nats; ratios of tokens farther apart are taken for that far, so that their squares are finite
MEAN_GAP: Final = 0.05  # nats a token: the ratio of a sequence of 100 tokens may be off by e^5
EFFECTIVE: Final = 0.9  # a tenth of the tokens is lost in the weights of the others

logger = logging.getLogger(__name__)


def gap_sums(trainer_logprobs: Tensor, sampler_logprobs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return what micro-batches and ranks add up, or combine by the maximum where `LARGEST` has the name.

    Args:
        trainer_logprobs: [T] in nats, at the sampling temperature.
        sampler_logprobs: [T] in nats, as the engine reported them.
        weights: [T]; tokens of weight 0 do not count, and their log-probabilities may be anything.

    Returns:
        Scalars, float64, on the device of the arguments, for `with_gap_metrics`.

    Raises:
        ValueError: shapes differ.
    """
    if not trainer_logprobs.shape == sampler_logprobs.shape == weights.shape or weights.ndim != 1:
        shapes = [tuple(tensor.shape) for tensor in (trainer_logprobs, sampler_logprobs, weights)]
        raise ValueError(f"trainer_logprobs, sampler_logprobs and weights are {shapes}; allowed: [T] each")
    counts = weights != 0
    difference = torch.where(counts, trainer_logprobs.double() - sampler_logprobs.double(), 0.0)
    bounded = difference.clamp(-FARTHEST, FARTHEST)
    ratio = torch.where(counts, bounded.exp(), 0.0)
    return {
        "sampler_gap": torch.nn.functional.pad(difference.abs(), (0, 1)).max(),
        "sampler_gap_sum": difference.abs().sum(),
        "sampler_kl_sum": (bounded.expm1() - bounded).sum(),
        "sampler_ratio_sum": ratio.sum(),
        "sampler_ratio_squares": ratio.square().sum(),
        "sampler_tokens": counts.sum().double(),
    }


def with_gap_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Return `totals` with metrics in the place of what `gap_sums` gave, combined over micro-batches and ranks.

    Returns:
        `sampler_gap` and `sampler_gap_mean`: largest and mean |trainer - sampler|, in nats. `sampler_kl`: mean of
        `rho - 1 - log rho` with `rho = exp(trainer - sampler)`, the k3 estimate of KL(sampler || trainer) (Schulman,
        "Approximating KL divergence", 2020), in nats. `sampler_effective`: effective sample size of the ratios as a
        share, `(sum rho)^2 / (T sum rho^2)`, from 1 / T to 1. Zeros and a share of 1 where no token counts.
    """
    found = dict(totals)
    names = ("tokens", "gap_sum", "kl_sum", "ratio_sum", "ratio_squares")
    tokens, gaps, kls, ratios, squares = (found.pop(f"sampler_{name}") for name in names)
    effective = ratios**2 / (tokens * squares) if tokens else 1.0
    means = {"sampler_gap_mean": gaps / max(1.0, tokens), "sampler_kl": kls / max(1.0, tokens)}
    return {**found, **means, "sampler_effective": effective}


class GapWatch:
    """Warns once sampler and trainer are too far apart, whenever they are twice as far, and where that is no number."""

    def __init__(self, mean_gap: float = MEAN_GAP, effective: float = EFFECTIVE) -> None:
        """Warn where `sampler_gap_mean` is above the one limit or `sampler_effective` below the other."""
        self.mean_gap, self.effective, self.lost = mean_gap, effective, False

    def see(self, metrics: Mapping[str, Any]) -> str:
        """Look at an update's metrics, where None is no finite number; return the warning, if any, that was logged."""
        gap, effective = metrics.get("sampler_gap_mean", 0.0), metrics.get("sampler_effective", 1.0)
        found, before = [], self.lost
        self.lost = not all(value is not None and math.isfinite(value) for value in (gap, effective))
        if self.lost and not before:
            found.append("differ by no finite number")
        if not self.lost and gap > self.mean_gap:
            largest = f"largest {metrics['sampler_gap']:.3g}; warned above {self.mean_gap:.3g}"
            found.append(f"differ by {gap:.3g} nats a token in the mean ({largest})")
            self.mean_gap = 2 * gap
        if not self.lost and effective < self.effective:
            limit = f"warned below {self.effective:.3g}"
            found.append(f"have ratios whose effective sample size is {effective:.3g} of the tokens ({limit})")
            self.effective = effective / 2
        if not found:
            return ""
        message = (
            f"update {metrics['update']}: sampler and trainer {' and '.join(found)}: what is learnt from is not what "
            "the policy does. Causes are stale weights, another precision, or settings of sampling that the "
            "log-probabilities do not know."
        )
        logger.warning(message)
        return message
