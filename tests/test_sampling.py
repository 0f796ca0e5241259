"""Training with a scheduler: the same bits after a stop, budgets kept, old rollouts weighed by what has changed."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import silent
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.kernels import policy_loss, token_logprob
from v05.rollout.hf import TransformersEngine
from v05.rollout.limits import MODES
from v05.rollout.pack import pack
from v05.rollout.queued import QueuedEngine
from v05.rollout.streaming import Request
from v05.small_policy import make_policy
from v05.stop import Interrupted, StopRequest
from v05.tasks import make_task
from v05.training.config import TrainConfig
from v05.training.learner import Learner
from v05.training.metrics import read_metrics
from v05.training.run import make_trainer, train_run
from v05.training.stream_config import RULES, StreamConfig, make_stream_config

SMALL: dict[str, Any] = dict(
    policy="tiny",
    prior="history",
    warm_start_steps=2,
    rollouts=128,
    rollouts_per_update=32,
    eval_every=64,
    heldout_prompts=4,
    heldout_samples=1,
    checkpoint_every=1,
)


def train(folder: Path, cache: Path, stream: StreamConfig, stop: StopRequest | None = None, **changes: Any) -> Any:
    config = TrainConfig(**{**SMALL, **changes})
    return train_run(config, folder, cache, stop or StopRequest(), silent, resume=True, stream=stream)


CASES = [*((mode, "v05") for mode in MODES), ("stream", "v05_from_one"), ("stream", "dr_grpo:4")]


@pytest.mark.parametrize(("mode", "algorithm"), CASES)
def test_every_mode_trains_within_its_budget(tmp_path: Path, mode: str, algorithm: str) -> None:
    summary = train(tmp_path, tmp_path / "cache", StreamConfig(mode, window=3), algorithm=algorithm)
    lines = read_metrics(tmp_path)[1:]
    assert summary["rollouts"] == 128
    assert all(0 < line["kept"] <= 32 for line in lines)
    assert [line["in_flight"] for line in lines[:2]] == [2 if mode == "stream" else 0] * 2
    assert lines[-1]["in_flight"] == 0
    stalest = [line["stalest"] for line in lines]
    assert max(stalest) == (2 if mode == "stream" else 0)
    assert not any(value for line in lines for name, value in line.items() if name.startswith("requests_"))
    if algorithm == "v05":
        assert sum(line["extra"] for line in lines) > 0
    if algorithm == "dr_grpo:4":
        assert {line["rollouts_per_prompt"] for line in lines} == {4.0}


class StopAfter(StopRequest):
    """Asks for a stop at the given look."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        super().__init__()

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("algorithm", ["v05", "v05_calibrated_loo:2", "v05_from_one"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, algorithm: str) -> None:
    stream, cache = StreamConfig("stream", window=3), tmp_path / "cache"
    train(tmp_path / "whole", cache, stream, algorithm=algorithm)
    stops = 0
    while True:
        try:
            train(tmp_path / "stopped", cache, stream, StopAfter(4), algorithm=algorithm)
            break
        except Interrupted:
            stops += 1
            assert stops < 40
    assert stops >= 1
    whole, stopped = (read_metrics(tmp_path / name) for name in ("whole", "stopped"))
    assert whole == stopped
    first, second = (tmp_path / name / "policy" / "model.safetensors" for name in ("whole", "stopped"))
    assert first.read_bytes() == second.read_bytes()


def test_conflicts_are_those_of_first_rollouts_whoever_samples(tmp_path: Path) -> None:
    """Groups that cannot grow conflict with a prior in the middle all the same: three failures are far from it."""
    for mode in ("batch", "stream"):
        summary = train(tmp_path / mode, tmp_path / "cache", StreamConfig(mode), algorithm="v05:3-3", prior="none")
        assert summary["conflicts"] == sum(line["conflicts"] for line in read_metrics(tmp_path / mode)[1:])
        assert summary["conflicts"] > 0.5 * summary["prompts"]


@pytest.mark.parametrize("rule", RULES)
def test_rules_share_one_budget(tmp_path: Path, rule: str) -> None:
    train(tmp_path, tmp_path / "cache", StreamConfig("planned", rule), algorithm="v05")
    lines = read_metrics(tmp_path)[1:]
    assert all(line["kept"] <= 32 for line in lines)
    if rule in ("utility", "variance"):
        assert all(line["kept"] == 32 for line in lines)
    assert len({line["prompts"] for line in lines[:3]}) == 1  # the last may have fewer rollouts left
    assert sum(line["kept"] for line in lines) == 128


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("changes", [{"algorithm": "v05_from_one"}, {"algorithm": "v05", "prompts": 12}])
def test_no_prompt_is_taken_off_the_stream_and_left_without_rollouts(
    tmp_path: Path, rule: str, changes: dict[str, Any]
) -> None:
    config = TrainConfig(**{**SMALL, "algorithm": changes["algorithm"]})
    stream = StreamConfig("planned", rule, prompts=changes.get("prompts", 0))
    trainer = make_trainer(config, tmp_path, StopRequest(), silent, stream)
    for _ in range(2):
        trainer.update()
    assert trainer.sampler is not None
    assert trainer.counters.groups == trainer.sampler.scheduler.position


def test_old_rollouts_are_weighed_by_what_has_changed() -> None:
    """The ratio of a stale rollout is the policy's probability over the sampler's."""
    task = make_task("arithmetic")
    sampler, policy = (make_policy(task.alphabet, "tiny", seed) for seed in (0, 1))
    rows = TransformersEngine(sampler).generate(
        task.prompts(0, 0, 4), [3] * 4, seed=0, temperature=1.0, max_new_tokens=4
    )
    batch = pack([rollout for row in rows for rollout in row], "token-mean", max_length=4)
    advantages = torch.linspace(-1, 1, 12)
    from v05.training.algorithms import parse_algorithm

    learner = Learner(
        policy,
        parse_algorithm("v05"),
        learning_rate=1e-4,
        temperature=1.0,
        epochs=1,
        micro_batches=2,
        behaviour=True,
    )
    logits = policy.response_logits(batch.prompts, batch.tokens, batch.sequence_offsets)
    logprobs = token_logprob(logits, batch.tokens).logprob
    expected = policy_loss(logprobs, batch.logprobs, advantages, batch.weights, sequence_offsets=batch.sequence_offsets)
    found = learner.learn(batch, advantages, 0)
    assert found["loss"] == pytest.approx(float(expected.loss.detach()), rel=1e-4)
    assert found["ratio_sum"] == pytest.approx(float((logprobs.detach() - batch.logprobs).exp().sum()), rel=1e-4)
    assert found["sampler_gap"] == pytest.approx(float((logprobs.detach() - batch.logprobs).abs().max()), rel=1e-4)


@pytest.mark.parametrize("mode", ["batch", "stream"])
def test_weights_are_pushed_once_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    trainer = make_trainer(TrainConfig(**SMALL), tmp_path, StopRequest(), silent, StreamConfig(mode))
    pushed: list[dict[str, torch.Tensor]] = []
    push = TransformersEngine.update_weights

    def watched(engine: TransformersEngine, weights: dict[str, torch.Tensor]) -> None:
        pushed.append({name: value.clone() for name, value in weights.items()})
        push(engine, weights)

    monkeypatch.setattr(TransformersEngine, "update_weights", watched)
    trainer.evaluate()
    start = copy.deepcopy(trainer.state())
    trainer.update()
    trainer.evaluate()
    trainer.update()
    assert len(pushed) == 2
    assert any(not torch.equal(value, pushed[0][name]) for name, value in pushed[1].items())
    trainer.load_state(*start)
    trainer.evaluate()
    assert len(pushed) == 3
    assert all(torch.equal(value, pushed[0][name]) for name, value in pushed[2].items())


def test_a_queue_is_one_batch_in_any_order() -> None:
    task = make_task("arithmetic")
    engine = QueuedEngine(TransformersEngine(make_policy(task.alphabet, "tiny", 0)))
    engine.update_weights(engine.engine.policy.model.state_dict(), 5)  # type: ignore[attr-defined]
    asked = [Request(number, prompt, 1000 - number, 1.0, 4) for number, prompt in enumerate(task.prompts(0, 0, 6))]
    engine.submit(asked[:2])
    engine.submit(asked[2:])
    engine.abort([1])
    first = {outcome.number: outcome.rollout for outcome in engine.wait(1.0)}
    assert sorted(first) == [0, 2, 3, 4, 5]
    engine.submit([dataclasses.replace(each, urgent=True) for each in reversed(asked) if each.number != 1])
    assert {outcome.number: outcome.rollout for outcome in engine.wait(1.0)} == first
    assert engine.wait(1.0) == []
    assert all(rollout is not None and set(rollout.versions) == {5} for rollout in first.values())
    engine.submit([asked[0], dataclasses.replace(asked[1], temperature=0.5)])
    with pytest.raises(ValueError, match="allowed: one for all that is queued"):
        engine.wait(1.0)


def test_from_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**SMALL, "rollouts": 64, "sampling": {"window": 2}}))
    out = tmp_path / "run"
    arguments = ["train", "--config", str(file), "--output", str(out), "--mode", "stream", "--rule", "variance"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    saved = json.loads((out / "sampling.json").read_text())
    assert (saved["mode"], saved["rule"], saved["window"]) == ("stream", "variance", 2)
    again = CliRunner().invoke(app, ["train", "--output", str(out), "--resume", "--mode", "async"])
    assert isinstance(again.exception, InputError)
    assert "mode is 'async'; allowed when resuming" in str(again.exception)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "eager"}, "allowed: batch, barrier, async, planned, stream"),
        ({"mode": "stream", "rule": "luck"}, "allowed: look-ahead, fixed, utility, variance, reinforce-ada"),
        ({"rule": "utility"}, "rule is 'utility' with mode batch"),
        ({"mode": "stream", "window": 0}, "window is 0; allowed: 1 or more"),
        ({"slots": 3}, "unknown key 'slots'"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_stream_config(settings, {}, "a file")


def test_dapo_needs_whole_batches(tmp_path: Path) -> None:
    config = TrainConfig(**{**SMALL, "algorithm": "dapo:4"})
    with pytest.raises(InputError, match="which drops equal groups: batch"):
        make_trainer(config, tmp_path, StopRequest(), silent, StreamConfig("stream"))
