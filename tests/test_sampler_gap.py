"""The gap between sampler and trainer, on numbers worked out by hand, and what is warned of."""

import logging
import math

import pytest
import torch
from torch import Tensor

from v05.training.sampler_gap import LARGEST, GapWatch, gap_sums, with_gap_metrics


def metrics_of(*parts: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """What parts of a batch come to, combined as a learner combines micro-batches and ranks."""
    sums = [{name: float(value) for name, value in gap_sums(*part).items()} for part in parts]
    return with_gap_metrics({name: (max if name in LARGEST else sum)(each[name] for each in sums) for name in sums[0]})


def test_hand_computed_numbers():
    # Ratios 2, 1, 1/2 and, masked, a NaN.
    trainer = torch.tensor([-1.0, -2.0, -3.0, float("nan")])
    sampler = torch.tensor([-1.0 - math.log(2), -2.0, -3.0 + math.log(2), -0.5])
    weights = torch.tensor([0.25, 0.5, 0.1, 0.0])
    for cuts in ([4], [1, 3], [2, 1, 1]):  # the last part of the last has no token that counts
        parts = zip(*(values.split(cuts) for values in (trainer, sampler, weights)), strict=True)
        found = metrics_of(*parts)
        assert found["sampler_gap"] == pytest.approx(math.log(2), rel=1e-6)
        assert found["sampler_gap_mean"] == pytest.approx(2 * math.log(2) / 3, rel=1e-6)
        assert found["sampler_kl"] == pytest.approx((2 + 1 + 0.5) / 3 - 1, rel=1e-6)  # the logarithms cancel
        assert found["sampler_effective"] == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-6)
        assert len(found) == 4


def test_the_k3_estimate_of_one_token():
    found = metrics_of((torch.tensor([-1.0]), torch.tensor([-3.0]), torch.ones(1)))
    assert found["sampler_kl"] == pytest.approx(math.exp(2) - 1 - 2, rel=1e-6)


def test_agreement_has_no_warning():
    logprobs = -torch.rand(1000, generator=torch.Generator().manual_seed(0))
    found = metrics_of((logprobs + 1e-6, logprobs, torch.ones(1000)))
    assert found["sampler_gap_mean"] < 2e-6
    assert found["sampler_effective"] == pytest.approx(1.0)
    assert GapWatch().see({"update": 1, **found}) == ""


def test_an_enormous_gap_stays_finite():
    far = (torch.tensor([0.0, -1.0]), torch.tensor([-2000.0, -1.0]), torch.ones(2))
    found = metrics_of(far, far)
    assert found["sampler_effective"] == pytest.approx(0.5)
    assert found["sampler_gap"] == 2000
    assert 1e40 < found["sampler_kl"] < math.inf


def test_nothing_to_compare():
    found = metrics_of((torch.tensor([float("nan")]), torch.tensor([1.0]), torch.zeros(1)))
    expected = {"sampler_gap": 0.0, "sampler_gap_mean": 0.0, "sampler_kl": 0.0, "sampler_effective": 1.0}
    assert found == metrics_of((torch.zeros(0), torch.zeros(0), torch.zeros(0))) == expected


def test_other_metrics_stay():
    sums = {name: float(value) for name, value in gap_sums(*[torch.zeros(2)] * 3).items()}
    assert with_gap_metrics({"loss": 3.0, **sums})["loss"] == 3.0


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[\(2,\), \(3,\), \(2,\)\]; allowed: \[T\] each"):
        gap_sums(torch.zeros(2), torch.zeros(3), torch.ones(2))


def test_a_growing_gap_is_warned_of_at_every_doubling(caplog: pytest.LogCaptureFixture) -> None:
    watch = GapWatch(mean_gap=0.1)
    with caplog.at_level(logging.WARNING):
        watch.see({"update": 0})
        for update, gap in enumerate([0.05, 0.2, 0.3, 0.41], 1):
            watch.see({"update": update, "sampler_gap": 1.5, "sampler_gap_mean": gap})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["update 2", "update 4"]
    assert "0.2 nats a token in the mean (largest 1.5; warned above 0.1)" in caplog.text


def test_a_few_tokens_that_outweigh_the_others_are_warned_of_on_their_own() -> None:
    trainer, sampler = torch.full((1000,), -1.0), torch.full((1000,), -1.0)
    sampler[:5] = -6.0
    found = {"update": 1, **metrics_of((trainer, sampler, torch.ones(1000)))}
    watch = GapWatch()
    warning = watch.see(found)
    assert "effective sample size is 0.0272 of the tokens (warned below 0.9)" in warning
    assert "in the mean" not in warning
    assert watch.see(found) == ""
    assert "warned below 0.0136" in watch.see({**found, "sampler_effective": 0.01})


@pytest.mark.parametrize("lost", [None, math.nan, math.inf])
@pytest.mark.parametrize("name", ["sampler_gap_mean", "sampler_effective"])
def test_a_gap_that_is_no_number_is_warned_of_until_it_is_one(name: str, lost: float | None) -> None:
    """The metrics of a run have None where a number is not finite."""
    watch, fine = GapWatch(), {"update": 7, "sampler_gap": 0.0, "sampler_gap_mean": 0.0, "sampler_effective": 1.0}
    assert "update 7: sampler and trainer differ by no finite number" in watch.see({**fine, name: lost})
    assert watch.see({**fine, name: lost}) == ""
    assert watch.see(fine) == ""
    assert watch.see({**fine, name: lost}) != ""
