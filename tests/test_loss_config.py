"""The table `loss`: what is allowed in it, what becomes of it in the loss, and that it stays with the run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import write_model
from typer.testing import CliRunner

from v05.batch import PackedTokens
from v05.cli import app
from v05.errors import InputError
from v05.kernels import policy_loss, token_logprob
from v05.policy import Policy
from v05.rollout.hf import TransformersEngine
from v05.rollout.pack import pack
from v05.training.algorithms import parse_algorithm
from v05.training.learner import Learner
from v05.training.loss_config import PLAIN, LossConfig, make_loss_config
from v05.training.pretrained import load_policy

TRUNCATED = LossConfig(sampler_correction="token_truncate", sampler_cap=1.5)
LOSSES = [
    LossConfig(clip_low=0.0, clip_high=0.0, dual_clip=1.2),
    LossConfig("gpg"),
    LossConfig("cispo", clip_high=0.05),
    LossConfig("sapo"),
    LossConfig(level="sequence", clip_low=0.01, clip_high=0.01),
    TRUNCATED,
    LossConfig("cispo", "sequence", sampler_correction="sequence_mask", sampler_cap=3.0),
]


def batch_of(policy: Policy, off: float) -> tuple[PackedTokens, torch.Tensor]:
    """Sampled answers whose log-probs are reported `off` by a random number of that size, with advantages."""
    prompts = ["one plus one", "two plus one", "one plus two", "two plus two"]
    rows = TransformersEngine(policy).generate(prompts, [3] * 4, seed=0, temperature=0.7, max_new_tokens=6)
    batch = pack([each for row in rows for each in row], "seq-mean-token-mean", max_length=6)
    noise = off * torch.randn(len(batch.logprobs), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(batch, logprobs=batch.logprobs + noise), torch.linspace(-1, 1, 12)


def learnt(policy: Policy, loss: LossConfig, **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of the last epoch, before it is scaled, and the metrics."""
    settings = dict(learning_rate=0.02, temperature=0.7, epochs=1, micro_batches=2, loss=loss) | options
    learner = Learner(policy, parse_algorithm("grpo"), **settings)  # type: ignore[arg-type]
    metrics = learner.learn(*batch_of(policy, 0.5), 20)
    gradient = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    return gradient * max(1.0, metrics["gradient_norm"] + 1e-6), metrics


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.surrogate}-{loss.level}-{loss.sampler_correction}")
@pytest.mark.parametrize("behaviour", [False, True])
def test_the_gradient_is_that_of_the_loss_asked_for(loss: LossConfig, behaviour: bool, tmp_path: Path) -> None:
    write_model(tmp_path)
    policies = [load_policy(str(tmp_path), train=True) for _ in range(3)]
    options = {"behaviour": behaviour}
    found = [learnt(policies[linear], loss, linear=bool(linear), **options)[0] for linear in (0, 1)]
    assert found[0].abs().max() > 1e-3
    assert (found[0] - found[1]).abs().max() < 1e-5
    policy = policies[2]
    batch, advantages = batch_of(policy, 0.5)
    logits = policy.response_logits(batch.prompts, batch.tokens, batch.sequence_offsets)
    logprobs, _ = token_logprob(logits, batch.tokens, temperature=0.7)
    settings = {name: value for name, value in loss.to_dict().items() if value is not None}
    if loss.corrects:
        settings["sampler_logprobs"] = batch.logprobs
    old = batch.logprobs if behaviour and not loss.corrects else logprobs.detach()
    given = (logprobs, old, advantages, batch.weights)
    policy_loss(*given, sequence_offsets=batch.sequence_offsets, **settings).loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])
    assert (found[0] - expected).abs().max() < 1e-5


def test_the_algorithms_bounds_stay_where_none_are_given() -> None:
    dapo = parse_algorithm("dapo")
    assert (PLAIN.options(dapo)["clip_low"], PLAIN.options(dapo)["clip_high"]) == (0.2, 0.28)
    own = LossConfig(clip_low=0.0, clip_high=3e-4).options(dapo)
    assert (own["clip_low"], own["clip_high"]) == (0.0, 3e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surrogat": "ppo"}, "unknown key 'surrogat' in a file"),
        ({"surrogate": "kl_cov"}, "surrogate is 'kl_cov'; allowed: ppo, cispo, sapo, gpg"),
        ({"surrogate": ["ppo"]}, "allowed: ppo"),
        ({"level": "batch"}, "level is 'batch'; allowed: token, sequence"),
        ({"sampler_correction": "some"}, "allowed: none, token_truncate, token_mask, sequence_truncate, sequence_mask"),
        ({"clip_low": "0.2"}, "clip_low is '0.2'; allowed: a number"),
        ({"clip_high": -0.1}, "clip_high is -0.1; allowed: a finite number, 0 or above"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0; allowed: None, or a finite number above 1"),
        ({"dual_clip": 2.0, "surrogate": "gpg"}, "dual_clip is 2.0; allowed: None, or a number above 1 with surrogate"),
        ({"kl": "k4"}, "kl is 'k4'; allowed: none, k1, k2, k3, k1"),
        ({"kl": "k3", "kl_coef": -0.1}, "kl_coef is -0.1; allowed: 0 or more, and finite"),
        ({"kl": "k3", "kl_coef": math.inf}, "kl_coef is inf; allowed: 0 or more, and finite"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1 without a kl; allowed: 0, or a kl of"),
        ({"sampler_cap": True}, "sampler_cap is True; allowed: a number"),
        ({"sampler_cap": None}, "sampler_cap is None; allowed: a number"),
        ({"sampler_cap": math.inf}, "sampler_cap is inf; allowed: a finite number"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_loss_config(settings, "a file")
    with pytest.raises(InputError, match="loss is 'gspo' in a file; allowed: a table"):
        make_loss_config("gspo", "a file")  # type: ignore[arg-type]


SMALL = dict(policy="tiny", prior="history", rollouts=64, rollouts_per_update=32, warm_start_steps=3)
SMALL |= dict(heldout_prompts=8, heldout_samples=2, checkpoint_every=1, eval_every=64)


@pytest.mark.parametrize("mode", ["batch", "stream"])
def test_the_loss_stays_with_the_run(mode: str, tmp_path: Path) -> None:
    file, run = tmp_path / "run.json", tmp_path / "run"
    loss = {"surrogate": "cispo", "sampler_correction": "token_truncate"}
    file.write_text(json.dumps({**SMALL, "loss": loss, "sampling": {"mode": mode}}))
    command = ["train", "--output", str(run), "--config", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert json.loads((run / "loss.json").read_text()) == {**PLAIN.to_dict(), **loss}
    again = CliRunner().invoke(app, ["train", "--output", str(run), "--resume", "--rollouts", "96"])
    assert again.exit_code == 0, again.output
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < line["sampler_weight_sum"] <= 2 * line["tokens"]
    file.write_text(json.dumps({**SMALL, "sampling": {"mode": mode}}))
    other = CliRunner().invoke(app, [*command, "--resume", "--rollouts", "96"])
    assert "surrogate is None; allowed when resuming" in str(other.exception)


def test_a_comparison_has_the_algorithms_own_losses(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**SMALL, "loss": {"level": "sequence"}}))
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(file), "--compare", "grpo:4"]
    assert "[loss] is given with --compare" in str(CliRunner().invoke(app, command).exception)
