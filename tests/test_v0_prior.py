"""The policy's context, a prompt's own past, and V0 as a prior whose state is all there is."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import LettersEmbedder
from training_runs import TINY, StopAfter, assert_same_run, silent

from v05.stop import StopRequest
from v05.training.config import PRIORS
from v05.training.run import Interrupted, make_prior, train_run
from v05.value.context import PolicyContext
from v05.value.memory import pack_text, unpack_text
from v05.value.model import V0
from v05.value.past import WithPast
from v05.value.prior import Middle, RunningMean
from v05.value.v0_prior import V0Prior

EASY = [f"{a}+{b}=" for a in range(1, 9) for b in range(1, 9)]
HARD = [f"{a}{b}+{b}{a}+{a}{a}=" for a in range(1, 9) for b in range(1, 9)]


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.int64)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_context_is_stratified_and_newest_first(low: float) -> None:
    context = PolicyContext((low, 1.0), size=20, window=10_000, memory=100)
    means = torch.tensor([1.0] * 8 + [low] * 56)
    context.observe(EASY, means, ones(64))
    prompts, outcomes = context.draw()
    assert len(prompts) == 20
    assert (outcomes == 1).sum() == 2  # 8 of 64 are solved, so 2.5 of 20: 2 or 3, and no fewer
    assert [prompt for prompt, value in zip(prompts, outcomes, strict=True) if value == 1] == EASY[6:8]
    assert prompts[-1] == EASY[-1]
    assert prompts == sorted(prompts, key=EASY.index)


def test_outcomes_are_replaced_forgotten_and_bounded() -> None:
    context = PolicyContext((0.0, 1.0), size=10, window=100, memory=12)
    context.observe(["a", "b", "c"], torch.tensor([0.0, 1.0, torch.nan]), torch.tensor([50, 1, 0]))
    context.observe(["a"], torch.tensor([1.0]), ones(1))
    prompts, outcomes = context.draw()
    assert prompts == ["b", "a"]
    assert outcomes.tolist() == [1.0, 1.0]
    context.observe(["d"], torch.tensor([0.5]), torch.tensor([100]))
    assert context.draw()[0] == ["a", "d"]  # b is 101 rollouts old
    context.observe(EASY, torch.ones(64), ones(64))
    assert len(context.outcomes) == 12


def test_texts_survive_a_checkpoint() -> None:
    texts = ["", "47+8=", "naïve ∑", "\ud800", ""]
    assert unpack_text(*pack_text(texts)) == texts
    assert unpack_text(*pack_text([])) == []


def test_the_past_is_trusted_as_it_proves() -> None:
    truth = torch.rand(64, generator=torch.Generator().manual_seed(0))
    prior = WithPast(RunningMean((0.0, 2.0), half_life=32), (0.0, 2.0))
    assert prior.trust == 0
    for shift in (0.0, 0.0, 0.5, 0.5, 0.9):
        prior.observe(EASY, truth + shift, 8 * ones(64))
    assert prior.trust > 0.8
    prior.observe(EASY[:32], truth[:32] + 1.0, 8 * ones(32))
    known = prior.predict(EASY)
    assert (known - truth - 0.95).abs().mean() < 0.1
    assert torch.equal(prior.predict(HARD), prior.prior.predict(HARD))


def test_past_and_trust_by_hand() -> None:
    prior = WithPast(Middle((0.0, 2.0)), (0.0, 2.0))  # which predicts 1
    prior.observe(["a", "b"], torch.tensor([0.5, 1.5]), torch.tensor([256, 256]))
    assert prior.predict(["a", "b"]).tolist() == [1.0, 1.0]  # no evidence yet; the level is 1
    prior.observe(["b"], torch.tensor([1.25]), torch.tensor([256]))
    # 512 rollouts of level 1 count half beside 256 of 1.25, so it has gained 0.125 since "a" was met; of the gap of 0.5
    # between past and prior of "b" half was right, 256 times
    assert prior.trust == pytest.approx(32 / (64 + 4 * 0.5**2))
    expected = 1 + prior.trust * (torch.tensor([0.625, 1.25]) - 1)
    torch.testing.assert_close(prior.predict(["a", "b"]), expected)
    prior.observe(["c"], torch.tensor([1.125]), torch.tensor([2048]))
    assert prior.trust == pytest.approx(16 / (32 + 4 * 0.5**2))  # the evidence counts half


def test_of_the_past_the_newest_is_remembered() -> None:
    prior = WithPast(Middle((0.0, 1.0)), (0.0, 1.0), memory=2)
    for prompt in "abac":
        prior.observe([prompt], torch.tensor([1.0]), ones(1))
    assert list(prior.met) == ["a", "c"]
    before = prior.state_dict()
    prior.observe(["a"], torch.tensor([torch.nan]), torch.tensor([0]))
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    for product, trust in ((9.0, 1.0), (-9.0, 0.0)):
        prior.evidence = torch.tensor([product, 1.0])
        assert prior.trust == trust


def test_a_past_that_says_nothing_is_not_trusted() -> None:
    generator = torch.Generator().manual_seed(0)
    prior = WithPast(RunningMean((0.0, 1.0)), (0.0, 1.0))
    for _ in range(12):
        prior.observe(EASY, torch.bernoulli(torch.full((64,), 0.5), generator=generator), ones(64))
    assert prior.trust < 0.1
    assert len(prior.met) == 64


def test_v0_learns_what_the_policy_can_do() -> None:
    prior = V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((0.0, 1.0)))
    assert prior.predict(EASY[:2]).tolist() == [0.5, 0.5]
    prior.observe(EASY[:2], torch.tensor([1.0, 0.5]), ones(2))
    assert prior.predict(HARD[:2]).tolist() == [0.75, 0.75]
    for start in range(0, 48, 16):
        prompts = EASY[start : start + 16] + HARD[start : start + 16]
        prior.observe(prompts, torch.tensor([0.9] * 16 + [0.1] * 16), 4 * ones(32))
    assert prior.predict(EASY[48:]).min() > 0.7
    assert prior.predict(HARD[48:]).max() < 0.3


def test_v0_is_fitted_again_after_so_many_rollouts() -> None:
    prior = V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((0.0, 1.0)), refresh=40)
    prior.observe(EASY[:15], torch.ones(15), ones(15))
    assert prior.conditioned is None
    prior.observe(EASY[15:16], torch.zeros(1), ones(1))
    assert prior.conditioned is not None
    prior.observe(HARD[:5], torch.zeros(5), 4 * ones(5))
    assert len(prior.used.prompts) == 16
    prior.observe(HARD[5:10], torch.zeros(5), 4 * ones(5))
    assert len(prior.used.prompts) == 26


@pytest.mark.parametrize("reward_range", [(0.0, 0.1), (-0.1, 0.7), (100.0, 100.3)])
def test_rewards_at_the_edges_of_any_range_are_taken(reward_range: tuple[float, float]) -> None:
    low, high = reward_range
    prior = V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext(reward_range))
    sums = torch.tensor([high] * 16 + [low] * 16) + torch.tensor([high] * 16 + [low] * 16) * 2
    prior.observe(EASY[:16] + HARD[:16], sums / 3, 3 * ones(32))
    assert prior.predict(EASY[16:]).min() > prior.predict(HARD[16:]).max()
    with pytest.raises(ValueError, match=r"entry 0 is 1\.01"):
        prior.model.predict(["a"], [low + 1.01 * (high - low)], ["b"], reward_range=reward_range)


def make(kind: str) -> WithPast:
    inner = V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((-1.0, 1.0)), refresh=40)
    return WithPast(inner if kind == "v0" else RunningMean((-1.0, 1.0)), (-1.0, 1.0))


@pytest.mark.parametrize("kind", ["v0", "mean"])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_state_is_all_there_is(kind: str, before: int) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(EASY[n : n + 20] + HARD[:5], torch.rand(25, generator=generator)) for n in (0, 10, 20, 30)]
    whole, stopped, resumed = make(kind), make(kind), make(kind)
    for prompts, means in batches[:before]:
        for prior in (whole, stopped):
            prior.predict(prompts)
            prior.observe(prompts, means, ones(25))
    resumed.load_state_dict({name: value.clone() for name, value in stopped.state_dict().items()})
    for prompts, means in batches[before:]:
        assert torch.equal(whole.predict(prompts), resumed.predict(prompts))
        for prior in (whole, resumed):
            prior.observe(prompts, means, ones(25))
    assert torch.equal(whole.predict(EASY + HARD), resumed.predict(EASY + HARD))
    left = resumed.state_dict()
    assert all(torch.equal(value, left[name]) for name, value in whole.state_dict().items())


def test_a_resumed_fit_keeps_its_hyper_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v05.value.v0_prior.FIRST_STEPS", 1)  # so that a search from there would go on
    first, resumed = (V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((0.0, 1.0))) for _ in "ab")
    first.observe(EASY[:20] + HARD[:20], torch.tensor([1.0, 0.5] * 10 + [0.0] * 20), ones(40))
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed.parameters, first.parameters)
    assert torch.equal(resumed.predict(EASY), first.predict(EASY))


def test_a_context_that_shrinks_is_no_longer_what_it_was() -> None:
    whole, resumed = (
        V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((0.0, 1.0), window=20), refresh=1) for _ in "ab"
    )
    whole.observe(EASY[:20], torch.tensor([1.0, 0.0] * 10), ones(20))
    whole.observe(HARD[:4], torch.zeros(4), 10 * ones(4))  # all else is 40 rollouts old
    assert whole.used.prompts == HARD[:4]
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(whole.predict(EASY), resumed.predict(EASY))


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_v0_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings, whole, stopped = dataclasses.replace(TINY, prior="v0"), tmp_path / "whole", tmp_path / "stopped"
    stop = StopRequest()
    train_run(settings, whole, tmp_path / "warm", StopRequest(), silent)
    with pytest.raises(Interrupted):
        train_run(settings, stopped, tmp_path / "warm", stop, StopAfter(stop, 96))
    train_run(settings, stopped, tmp_path / "warm", StopRequest(), silent, resume=True)
    assert_same_run(whole, stopped)


def test_each_kind_of_prior_is_made() -> None:
    kinds = {name: make_prior(dataclasses.replace(TINY, prior=name), (0.0, 1.0)) for name in PRIORS if name != "v0"}
    assert isinstance(kinds["history"], WithPast)
    assert isinstance(kinds["constant"], RunningMean)
    assert isinstance(kinds["none"], Middle)
    kinds["none"].observe(EASY, torch.ones(64), ones(64))
    assert kinds["none"].predict(EASY[:2]).tolist() == [0.5, 0.5]
    assert make_prior(dataclasses.replace(TINY, algorithm="grpo", prior="v0"), (0.0, 1.0)) is None


def test_settings_that_are_not_allowed() -> None:
    with pytest.raises(ValueError, match="size, window and memory are 0"):
        PolicyContext((0.0, 1.0), size=0)
    with pytest.raises(ValueError, match="memory is 0"):
        WithPast(RunningMean((0.0, 1.0)), (0.0, 1.0), memory=0)
    with pytest.raises(ValueError, match="refresh is 0"):
        V0Prior(V0.embedded(embedder=LettersEmbedder()), PolicyContext((0.0, 1.0)), refresh=0)
