"""The KL of a run to the policy that it started from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loss_config import batch_of
from tiny_chat import write_model
from training_runs import TINY, StopAfter, assert_same_run, silent

from v05.checkpoint import read_checkpoint
from v05.kernels import policy_loss, token_logprob
from v05.policy import Policy
from v05.stop import Interrupted, StopRequest
from v05.training.algorithms import parse_algorithm
from v05.training.learner import Learner
from v05.training.loss_config import LossConfig
from v05.training.pretrained import load_policy
from v05.training.run import train_run

RUN = dataclasses.replace(TINY, learning_rate=0.01)


def make_learner(policy: Policy, **options: Any) -> Learner:
    settings: dict[str, Any] = dict(learning_rate=0.02, temperature=0.7, epochs=1, micro_batches=2) | options
    return Learner(policy, parse_algorithm("grpo"), **settings)


def move(policy: Policy) -> None:
    """Add noise to every weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kl", ["k1", "k3", "k1+"])
def test_the_kl_refers_to_the_policy_at_the_start(kl: str, linear: bool, tmp_path: Path) -> None:
    write_model(tmp_path)
    policy, start = load_policy(str(tmp_path), train=True), load_policy(str(tmp_path))
    learner = make_learner(policy, linear=linear, loss=LossConfig(kl=kl, kl_coef=0.5))
    move(policy)
    batch, advantages = batch_of(policy, 0.0)
    place = (batch.prompts, batch.tokens, batch.sequence_offsets)
    logprobs, _ = token_logprob(policy.response_logits(*place), batch.tokens, temperature=0.7)
    reference, _ = token_logprob(start.response_logits(*place), batch.tokens, temperature=0.7)
    given = (logprobs, logprobs.detach(), advantages, batch.weights)
    options: dict[str, Any] = dict(sequence_offsets=batch.sequence_offsets, ref_logprobs=reference, kl_coef=0.5, kl=kl)
    expected = policy_loss(*given, **options)
    expected.loss.backward()
    gradient = [parameter.grad.clone() for parameter in policy.model.parameters()]
    metrics = learner.learn(batch, advantages, 20)
    assert abs(float(expected.metrics["kl_sum"])) > 1
    assert metrics["kl_sum"] == pytest.approx(float(expected.metrics["kl_sum"]), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(expected.loss.detach()), abs=1e-5)
    for parameter, wanted in zip(policy.model.parameters(), gradient, strict=True):
        found = parameter.grad * max(1.0, metrics["gradient_norm"] + 1e-6)
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("linear", [False, True])
def test_the_reference_stays_as_it_was(linear: bool, tmp_path: Path) -> None:
    policy = load_policy(str(write_model(tmp_path)), train=True)
    learner = make_learner(policy, linear=linear, epochs=2, loss=LossConfig(kl="k3", kl_coef=0.1))
    batch, advantages = batch_of(policy, 0.0)
    first = make_learner(policy, linear=linear, learning_rate=1e-30, loss=LossConfig(kl="k3")).learn(
        batch, advantages, 0
    )
    assert first["kl_sum"] == 0.0
    assert learner.learn(batch, advantages, 20)["kl_sum"] > 0.0, "the second epoch's"
    assert learner.reference is not None
    untouched = load_policy(str(tmp_path)).model.state_dict()
    for name, value in learner.reference.model.state_dict().items():
        assert torch.equal(value, untouched[name])
        assert not value.requires_grad
    assert make_learner(policy).reference is None


def run(folder: Path, cache: Path, loss: LossConfig, stop_after: int = 10**9, **options: Any) -> None:
    stop = StopRequest()
    train_run(RUN, folder, cache, stop, StopAfter(stop, stop_after), loss=loss, **options)


def kl_of(folder: Path) -> float:
    """Mean KL over the tokens of the last updates."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-3:]
    return sum(line["kl_sum"] for line in lines) / sum(line["tokens"] for line in lines)


def test_a_run_with_a_kl_goes_on_bit_for_bit_and_stays_near_its_start(tmp_path: Path) -> None:
    loss, cache = LossConfig(kl="k3", kl_coef=1.0), tmp_path / "cache"
    run(tmp_path / "whole", cache, loss)
    with pytest.raises(Interrupted):
        run(tmp_path / "part", cache, loss, stop_after=96)
    run(tmp_path / "part", cache, loss, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    checkpoint = read_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    assert sum("embed_tokens" in name for name in checkpoint.tensors["policy"]) == 1, "the reference is not saved"
    run(tmp_path / "measured", cache, LossConfig(kl="k3"))
    train_run(RUN, tmp_path / "plain", cache, StopRequest(), silent)
    assert 0 < kl_of(tmp_path / "whole") < 0.5 * kl_of(tmp_path / "measured")
    ends = [read_checkpoint(tmp_path / name / "checkpoints") for name in ("measured", "plain")]
    for name, value in ends[0].tensors["policy"].items():  # type: ignore[union-attr]
        assert torch.equal(value, ends[1].tensors["policy"][name]), "a coefficient of 0 only measures"  # type: ignore[union-attr]
