"""Interquartile means over runs and their bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

RESAMPLES: Final = 2000


class Interval(NamedTuple):
    """A statistic with its 95 % interval."""

    value: float
    low: float
    high: float


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of the middle half of runs `[R, ...]`: a quarter, rounded down, is cut at either end."""
    cut = len(values) // 4
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def bootstrap(
    runs: int, statistic: Callable[[np.ndarray], float], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return a statistic of runs with its percentile bootstrap interval.

    Args:
        runs: R, how many there are.
        statistic: of the runs at the given places, [R] int64; seeds shared by several algorithms are thus resampled
            together.
        resamples: how often R runs are drawn, with replacement.
        seed: of these draws.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(runs, size=runs)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")  # draws may be infinite
    return Interval(statistic(np.arange(runs)), float(low), float(high))
