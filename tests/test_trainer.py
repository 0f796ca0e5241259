"""The training loop: exact rollout counts, finite losses, gradients that do not depend on the split."""

import math
import random

import pytest
import torch
from first_digit import make_trainer

from v05.batch import PackedTokens
from v05.kernels import group_advantage
from v05.packing import AGGREGATIONS
from v05.rollout.engine import Rollout
from v05.rollout.hf import TransformersEngine
from v05.rollout.pack import pack
from v05.seeds import seed_of
from v05.training.algorithms import ALGORITHMS, equal_groups, parse_algorithm
from v05.training.counters import Counters
from v05.training.sampling import Stopped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "algorithm", [*ALGORITHMS, "v05:1", "v05:3", "v05_loo:1", "v05_calibrated_loo:1", "grpo:4", "dr_grpo:24", "spo:5"]
)
def test_every_algorithm_spends_exactly_its_rollouts(algorithm: str) -> None:
    trainer = make_trainer(algorithm=algorithm, rollouts=160)
    lines = []
    while not trainer.done:
        lines.append(trainer.update())
    assert trainer.counters.rollouts == 160 == sum(line["kept"] + line["dropped"] for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines if line["kept"])
    assert trainer.counters.position == trainer.counters.groups + trainer.counters.dropped // trainer.algorithm.k_init
    if algorithm != "dapo":
        assert [line["kept"] for line in lines] == [64, 64, 32]
    assert all(torch.isfinite(parameter).all() for parameter in trainer.policy.model.parameters())


@pytest.mark.parametrize("algorithm", ["spo", "grpo:4", "v05:4-4"])
def test_groups_of_one_size_are_sampled_at_once(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, counts = make_trainer(algorithm=algorithm), list[int]()
    generate = trainer.engine.generate

    def counting(prompts: list[str], wanted: list[int], **limits: object) -> list[list[Rollout]]:
        counts.append(sum(wanted))
        return generate(prompts, wanted, **limits)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.engine, "generate", counting)
    trainer.update()
    assert counts == [64]


def test_v05_grows_groups_that_contradict_the_prior_and_no_others() -> None:
    trainer = make_trainer(algorithm="v05", rollouts=6400, rollouts_per_update=128)
    total = 0
    for _ in range(4):
        sample, _ = trainer._sample()
        counts = sample.groups.counts
        assert sample.spent == 128 == int(counts.sum())
        assert int(counts.max()) <= 16
        grown = int((counts > 4).sum())
        assert grown <= trainer._conflicts(sample)
        total += grown
        trainer.update()
    assert total > 0


def test_dapo_learns_from_mixed_groups_only_and_refills() -> None:
    trainer = make_trainer(algorithm="dapo:4", rollouts=1000)
    sample, _ = trainer._sample()
    assert not equal_groups(sample.groups).any()
    assert sample.kept == 64
    assert sample.spent == 64 + sample.dropped > 64


@pytest.mark.parametrize("right", [0.0, 0.04])
def test_dapo_looks_for_groups_that_differ_within_bounds_and_learns_from_those_it_has(right: float) -> None:
    trainer, draw = make_trainer(algorithm="dapo:4", rollouts=1600), random.Random(0)
    trainer.grader.verify = lambda prompt, text: float(draw.random() < right)  # type: ignore[attr-defined]
    lines = []
    while not trainer.done:
        lines.append(trainer.update())
    assert max(line["kept"] + line["dropped"] for line in lines) == 640
    assert sum(line["kept"] + line["dropped"] for line in lines) == 1600
    assert [line["kept"] > 0 for line in lines] == ["loss" in line for line in lines] == [right > 0] * len(lines)


def test_dapo_does_not_look_for_a_group_of_one_that_differs() -> None:
    trainer, draw = make_trainer(algorithm="dapo:4", rollouts=1600, rollouts_per_update=65), random.Random(0)
    trainer.grader.verify = lambda prompt, text: float(draw.random() < 0.5)  # type: ignore[attr-defined]
    sample, _ = trainer._sample()
    assert sample.kept == 64
    assert sample.spent < 130


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts", [2, 4])
def test_the_gradient_does_not_depend_on_the_split(aggregation: str, parts: int) -> None:
    gradients = []
    for micro_batches in (1, parts):
        trainer = make_trainer(micro_batches=micro_batches)
        sample, _ = trainer._sample()
        rollouts = [rollout for group in sample.rollouts for rollout in group]
        batch = pack(rollouts, aggregation, max_length=3)
        trainer.learner.learn(batch, sample.groups.rewards - 0.4, 0)
        grads = [parameter.grad for parameter in trainer.policy.model.parameters()]
        gradients.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert gradients[0].abs().max() > 1e-4
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


def test_the_learning_rate_rises_over_ten_updates() -> None:
    trainer, rates = make_trainer(learning_rate=0.5), []
    sample, _ = trainer._sample()
    batch = pack([rollout for group in sample.rollouts for rollout in group], "token-mean", max_length=3)
    for update in (0, 4, 20):
        trainer.learner.learn(batch, sample.groups.rewards, update)
        rates.append(trainer.learner.optimizer.param_groups[0]["lr"])
    assert rates == [0.05, 0.25, 0.5]


def test_training_improves_the_policy() -> None:
    trainer = make_trainer(
        algorithm="v05:2", rollouts=2560, rollouts_per_update=128, learning_rate=3e-3, heldout_prompts=64
    )
    before, total, _ = trainer.evaluate()
    while not trainer.done:
        trainer.update()
    after = trainer.evaluate().right
    assert after - before > 0.2 * total


def test_the_sampler_and_the_trainer_agree_on_log_probabilities() -> None:
    trainer = make_trainer(temperature=0.7)
    assert trainer.update()["sampler_gap"] < 1e-5


def test_later_epochs_use_the_log_probabilities_of_the_first() -> None:
    line = make_trainer(epochs=3, learning_rate=0.1, algorithm="reinforce").update()
    assert line["clipped_low"] + line["clipped_high"] >= 0
    assert line["ratio_sum"] != line["tokens"]


def test_the_loss_is_the_mean_over_the_epochs() -> None:
    once, thrice = (make_trainer(epochs=epochs, learning_rate=1e-12).update() for epochs in (1, 3))
    assert abs(once["loss"]) > 1e-3
    assert thrice["loss"] == pytest.approx(once["loss"], rel=1e-4)
    assert thrice["tokens"] == 3 * once["tokens"]
    assert thrice["entropy"] == once["entropy"]


@pytest.mark.parametrize("algorithm", ["v05", "v05_calibrated_loo:1"])
def test_state_goes_on_bit_for_bit(algorithm: str) -> None:
    whole, first, second = (make_trainer(algorithm=algorithm) for _ in range(3))
    lines = [whole.update() for _ in range(3)]
    first.update()
    second.load_state(*first.state())
    assert [second.update(), second.update()] == lines[1:]
    for name, value in whole.policy.model.state_dict().items():
        assert torch.equal(value, second.policy.model.state_dict()[name])


def test_dapo_stops_while_it_looks_for_groups_that_differ() -> None:
    stopped, plain = (make_trainer(algorithm="dapo:4", rollouts=1000) for _ in range(2))
    rounds = []

    def generate(prompts, counts, **limits):  # type: ignore[no-untyped-def]
        rounds.append(sum(counts))
        return TransformersEngine.generate(stopped.engine, prompts, counts, **limits)  # type: ignore[arg-type]

    stopped.engine.generate = generate  # type: ignore[method-assign]
    stopped.stopped = lambda: len(rounds) == 2
    with pytest.raises(Stopped):
        stopped.update()
    assert len(rounds) == 2
    assert stopped.counters == Counters(expected_extra=0.0)
    stopped.stopped = lambda: False
    assert stopped.update() == plain.update()


def test_evaluation_leaves_training_alone() -> None:
    plain, evaluated = make_trainer(), make_trainer()
    assert evaluated.evaluate() == evaluated.evaluate()
    assert plain.update() == evaluated.update()


def test_opo_weighs_answers_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = make_trainer(algorithm="opo:4"), list[tuple[PackedTokens, torch.Tensor]]()
    sample, _ = trainer._sample()
    monkeypatch.setattr(trainer, "_sample", lambda: (sample, {}))
    monkeypatch.setattr(trainer.learner, "learn", lambda batch, found, _: seen.append((batch, found)) or {})
    trainer.update()
    [(batch, found)] = seen
    lengths = batch.sequence_offsets.diff()
    assert len(lengths.unique()) > 1
    groups = sample.groups
    options = dict(estimator="opo", lengths=lengths, reward_range=(0.0, 1.0))
    assert torch.equal(found, group_advantage(groups.rewards, groups.offsets, **options))  # type: ignore[arg-type]
    assert not torch.equal(found, parse_algorithm("dr_grpo").advantages(groups, None, (0.0, 1.0)))


def test_seeds_depend_on_every_part() -> None:
    assert len({seed_of("a", 1, 2), seed_of("a", 2, 1), seed_of("a", 12), seed_of("b", 1, 2)}) == 4
    assert 0 <= seed_of("a") < 2**63
