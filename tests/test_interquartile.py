"""Interquartile means against scipy, bootstrap intervals against theory, and where a curve reaches a target."""

import numpy as np
import pytest
from scipy.stats import trim_mean

from v05.studies.interquartile import bootstrap, interquartile_mean
from v05.training.compare import first_reach


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 5, 8, 11])
def test_the_mean_of_the_middle_half_is_scipys(runs: int) -> None:
    values = np.random.default_rng(runs).normal(size=(runs, 3, 2))
    np.testing.assert_allclose(interquartile_mean(values), trim_mean(values, 0.25, axis=0))


def test_intervals_have_the_width_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(400, lambda chosen: float(values[chosen].mean()))
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)


def test_intervals_are_the_same_every_time_and_nothing_without_spread() -> None:
    values = np.array([0.3, 0.5, 0.4])
    first, again = (bootstrap(3, lambda chosen: float(values[chosen].max())) for _ in range(2))
    assert first == again
    assert bootstrap(4, lambda chosen: 0.25) == (0.25, 0.25, 0.25)


def test_where_a_curve_reaches_a_target() -> None:
    budgets, accuracy = np.array([0.0, 100.0, 200.0, 300.0]), np.array([0.2, 0.1, 0.5, 0.4])
    assert first_reach(budgets, accuracy, 0.3) == 150
    assert first_reach(budgets, accuracy, 0.2) == 0
    assert first_reach(budgets, accuracy, 0.5) == 200
    assert first_reach(budgets, accuracy, 0.6) == float("inf")
