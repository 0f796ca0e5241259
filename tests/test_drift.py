"""The gap between sampler and trainer, on numbers worked out by hand."""

import math

import pytest
import torch

from v05.rollout.drift import measure_drift


def test_hand_computed_numbers():
    # Ratios 2, 1, 1/2 and, masked, a NaN.
    trainer = torch.tensor([-1.0, -2.0, -3.0, float("nan")])
    sampler = torch.tensor([-1.0 - math.log(2), -2.0, -3.0 + math.log(2), -0.5])
    drift = measure_drift(trainer, sampler, torch.tensor([0.25, 0.5, 0.1, 0.0]))
    assert drift.tokens == 3
    assert drift.mean_gap == pytest.approx(2 * math.log(2) / 3, rel=1e-6)
    assert drift.max_gap == pytest.approx(math.log(2), rel=1e-6)
    assert drift.kl == pytest.approx((2 + 1 + 0.5) / 3 - 1, rel=1e-6)  # the logarithms cancel
    assert drift.effective == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-6)
    assert "0.4621 nats (allowed: 0.05), at most 0.6931" in drift.warning
    assert "77.8% of 3 tokens (allowed: 90%)" in drift.warning


def test_agreement_has_no_warning():
    logprobs = -torch.rand(1000, generator=torch.Generator().manual_seed(0))
    drift = measure_drift(logprobs + 1e-6, logprobs, torch.ones(1000))
    assert drift.warning == ""
    assert drift.mean_gap < 2e-6
    assert drift.effective == pytest.approx(1.0)


def test_thresholds_are_each_their_own():
    trainer, sampler, weights = torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -1.1]), torch.ones(2)
    assert "effective" not in measure_drift(trainer, sampler, weights).warning  # a common factor loses no sample
    assert measure_drift(trainer, sampler, weights, max_mean_gap=0.11).warning == ""
    far = measure_drift(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0]), weights, max_mean_gap=1.0)
    assert far.warning.startswith("sampler and trainer drift apart: effective sample size is 82")


def test_an_enormous_gap_stays_finite():
    drift = measure_drift(torch.tensor([0.0, -1.0]), torch.tensor([-2000.0, -1.0]), torch.ones(2))
    assert drift.effective == pytest.approx(0.5)
    assert drift.max_gap == 2000
    assert drift.kl == math.inf


def test_nothing_to_compare():
    drift = measure_drift(torch.tensor([float("nan")]), torch.tensor([1.0]), torch.zeros(1))
    assert (drift.tokens, drift.mean_gap, drift.effective, drift.warning) == (0, 0.0, 1.0, "")


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[\(2,\), \(3,\), \(2,\)\]; allowed: \[T\] each"):
        measure_drift(torch.zeros(2), torch.zeros(3), torch.ones(2))
    with pytest.raises(ValueError, match="sampler_logprobs of a token with weight is not finite"):
        measure_drift(torch.zeros(2), torch.tensor([0.0, -math.inf]), torch.ones(2))
