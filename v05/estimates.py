"""What samples of a model say about it: mean@n, pass@k, and intervals over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

RESAMPLES: Final = 10_000  # of the bootstrap
LEVEL: Final = 0.95  # of the intervals


class Estimate(NamedTuple):
    """A mean over prompts with its 95 % interval; the bounds are nan for fewer than two prompts."""

    value: float
    low: float
    high: float


class HeldOut(NamedTuple):
    """Answers to held-out prompts.

    Attributes:
        right: how many are right.
        total: how many there are, those that never came included.
        worth: how many independent ones would tell as much: as many as prompts where all answers to a prompt agree, as
            many as answers where they agree by chance alone.
    """

    right: int
    total: int
    worth: float

    @classmethod
    def of(cls, right: Sequence[int], samples: int) -> HeldOut:
        """Return what so many right answers of `samples` to each prompt come to."""
        total, share = len(right) * samples, sum(right) / (len(right) * samples)
        spread = float(np.var(np.array(right) / samples, ddof=1)) if len(right) > 1 else 0.0
        worth = share * (1 - share) * len(right) / spread if spread else 0.0  # p (1 - p) / worth is the mean's variance
        return cls(sum(right), total, min(max(worth, len(right)), total))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of `k` answers is right.

    Args:
        samples: answers sampled to one prompt, `n`.
        right: how many of them are right, `c`, 0 to `n`.
        k: 1 to `n`.

    Returns:
        `1 - C(n - c, k) / C(n, k)`.

    Raises:
        ValueError: a number that is not allowed.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), equation 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; allowed: 1 to {samples}")
    if not 0 <= right <= samples:
        raise ValueError(f"right is {right}; allowed: 0 to {samples}")
    return 1.0 - float(np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


def over_prompts(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Return the mean over prompts with a percentile bootstrap interval that resamples the prompts.

    Prompts are the independent units: the interval holds both their spread and the chance in their samples. Equal
    values are drawn together, so that a hundred thousand prompts with 16 answers each cost what 17 prompts do.

    Args:
        values: one number a prompt, [P], P at least 1.
        seed: fixes the resamples.
    """
    numbers = np.asarray(values, dtype=np.float64)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    values, counts = np.unique(numbers, return_counts=True)
    total = len(numbers)
    draws = (rng.multinomial(total, counts / total, size=500) for _ in range(RESAMPLES // 500))
    means = np.concatenate([drawn @ values / total for drawn in draws])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))


def powers(samples: int) -> list[int]:
    """Return 1, 2, 4 and so on up to `samples`, which is always the last."""
    doubled = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*doubled, samples]


def binomial_interval(right: float, total: float) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share.

    Args:
        right: successes, 0 to `total`.
        total: independent trials, 1 or more; neither need be whole, see `HeldOut`.

    Returns:
        Lower and upper bound, from 0 to 1.
    """
    z = 1.959963984540054
    share, inverse = right / total, z * z / total
    centre = (share + inverse / 2) / (1 + inverse)
    half = z / (1 + inverse) * math.sqrt(share * (1 - share) / total + inverse / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)
