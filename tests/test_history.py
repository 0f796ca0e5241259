"""Priors: what they predict, how they forget, and that their state is all there is."""

import pytest
import torch

from v05.value.history import HistoryPrior, describe, shape
from v05.value.prior import Prior, RunningMean

EASY = [f"{first}+{second}=" for first in range(1, 9) for second in range(1, 9)]
HARD = [f"{first}{second}+{second}{first}+{first}{first}=" for first in range(1, 9) for second in range(1, 9)]


def ones(prompts: list[str]) -> torch.Tensor:
    return torch.ones(len(prompts), dtype=torch.int64)


def test_similar_prompts_get_similar_predictions() -> None:
    prior = HistoryPrior((0.0, 1.0))
    for start in range(0, 48, 8):
        prompts = EASY[start : start + 8] + HARD[start : start + 8]
        prior.observe(prompts, torch.tensor([0.9] * 8 + [0.1] * 8), 4 * ones(prompts))
    predicted = prior.predict([*EASY[48:], *HARD[48:]])
    assert (predicted[:16] > 0.8).all()
    assert (predicted[16:] < 0.2).all()


def test_without_similarity_the_wide_kernel_wins() -> None:
    prior = HistoryPrior((0.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        outcomes = torch.bernoulli(torch.full((32,), 0.3), generator=generator)
        prior.observe(EASY[:16] + HARD[:16], outcomes, ones(EASY[:32]))
    assert (prior.predict(EASY[16:32] + HARD[16:32]) - 0.3).abs().max() < 0.1


def test_the_narrowest_kernel_by_hand() -> None:
    """To it "1" and "a" have nothing in common: each is its own outcomes and one rollout of the overall mean."""
    prior = HistoryPrior((0.0, 1.0), half_life=8)
    prior.observe(["1", "a"], torch.tensor([1.0, 0.0]), torch.tensor([3, 3]))
    assert prior.predict(["1", "a"]).tolist() == pytest.approx([(3 + 0.5) / 4, 0.5 / 4])
    prior.observe(["1"], torch.tensor([0.375]), torch.tensor([8]))
    assert prior.errors[0] == pytest.approx(8 * (0.875 - 0.375) ** 2)
    overall = (1.5 + 8 * 0.375) / (1.5 + 8 + 1.5)  # what was there counts half after 8 rollouts
    prior.observe(["1"], torch.tensor([(1.5 + 8 * 0.375 + overall) / 10.5]), torch.tensor([8]))
    assert prior.errors[0] == pytest.approx(8 * 0.25 / 2, rel=1e-5)  # it was right, and half is forgotten


def test_a_running_mean_by_hand() -> None:
    prior = RunningMean((0.0, 2.0), half_life=8)  # starts from one rollout of 1
    prior.observe(["a", "b"], torch.tensor([2.0, 0.5]), torch.tensor([6, 2]))
    assert prior.predict(["c"]).tolist() == pytest.approx([(0.5 + 6 * 2 + 2 * 0.5) / (0.5 + 8)])


@pytest.mark.parametrize("prior", [HistoryPrior((0.0, 1.0)), RunningMean((0.0, 1.0))])
def test_old_outcomes_are_forgotten(prior: Prior) -> None:
    assert prior.predict(["1+1="]).tolist() == [0.5]
    for value in (0.0, 1.0):
        for _ in range(40):
            prior.observe(EASY, torch.full((64,), value), 4 * ones(EASY))
    assert (prior.predict(EASY) > 0.95).all()


@pytest.mark.parametrize("kind", [HistoryPrior, RunningMean])
def test_state_is_all_there_is(kind: type[HistoryPrior] | type[RunningMean]) -> None:
    first, second = kind((-1.0, 1.0)), kind((-1.0, 1.0))
    first.observe(EASY[:9], torch.linspace(-1, 1, 9), ones(EASY[:9]))
    first.observe(HARD[:5], torch.linspace(-1, 1, 5), ones(HARD[:5]))
    second.load_state_dict(first.state_dict())
    for prior in (first, second):
        prior.observe(EASY[9:12], torch.ones(3), ones(EASY[:3]))
    assert torch.equal(first.predict(HARD + EASY), second.predict(HARD + EASY))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize("kind", [HistoryPrior, RunningMean])
def test_prompts_without_rollouts_say_nothing(kind: type[HistoryPrior] | type[RunningMean]) -> None:
    prior = kind((0.0, 1.0))
    prior.observe(EASY[:4], torch.ones(4), ones(EASY[:4]))
    before = prior.predict(EASY)
    prior.observe(HARD[:1], torch.tensor([torch.nan]), torch.tensor([0]))
    assert torch.equal(prior.predict(EASY), before)


def test_memory_is_bounded_and_predictions_stay_in_range() -> None:
    prior = HistoryPrior((0.0, 1.0), capacity=10)
    prior.observe(EASY, torch.ones(64), ones(EASY))
    assert len(prior.means) == 10
    assert prior.predict(HARD).max() <= 1.0
    prior.observe(HARD[:10], torch.zeros(10), ones(HARD[:10]))
    assert prior.predict(EASY).max() == 0.0  # the oldest went


def test_descriptions_are_unit_vectors_of_text_and_shape() -> None:
    assert shape("Solve 12 + x?") == "Aaaaa 99 + a?"
    described = describe(["12+3=", "45+6=", "", "ä"])
    assert torch.allclose(described[:2].norm(dim=-1), torch.ones(2, 2))
    assert torch.equal(described[0, 1], described[1, 1])
    assert not torch.equal(described[0, 0], described[1, 0])
    assert (described[2] == 0).all()
    assert describe([]).shape[0] == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        HistoryPrior((0.0, 1.0), capacity=0)
    with pytest.raises(ValueError, match="half_life is -1"):
        RunningMean((0.0, 1.0), half_life=-1)
