"""mean@n and pass@k: estimators and intervals."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from v05.estimates import over_prompts, pass_at_k, powers


def test_pass_at_k_counts_the_draws_that_hold_a_right_answer() -> None:
    for samples, right in ((1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (6, 6)):
        answers = [number < right for number in range(samples)]
        for k in range(1, samples + 1):
            draws = [any(draw) for draw in itertools.combinations(answers, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(np.mean(draws))
            assert pass_at_k(samples, right, k) == pytest.approx(
                1 - math.comb(samples - right, k) / math.comb(samples, k)
            )
    assert pass_at_k(100_000, 3, 50_000) == pytest.approx(0.875, abs=1e-4)
    for bad in ((4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="allowed"):
            pass_at_k(*bad)


def test_intervals_cover_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        chances = rng.beta(1, 2, size=40)
        low, high = over_prompts(rng.binomial(8, chances) / 8, seed=trial)[1:]
        covered += low <= 1 / 3 <= high
    assert 0.88 <= covered / 120 <= 0.99
    assert math.isnan(over_prompts([0.5]).low)
    assert over_prompts([1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert powers(16) == [1, 2, 4, 8, 16]
    assert powers(6) == [1, 2, 4, 6]
    assert powers(1) == [1]


def test_intervals_of_many_prompts_take_no_more_than_their_different_values() -> None:
    values = np.random.default_rng(0).integers(0, 17, 100_000) / 16
    tracemalloc.start()
    found = over_prompts(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (found.high - found.value, found.value - found.low) == pytest.approx((half, half), rel=0.05)
    assert peak < 16 * values.nbytes
