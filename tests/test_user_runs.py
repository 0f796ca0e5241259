"""Runs of a user's model on the user's data, and the settings and options of these."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_user_model import RECORDS
from tiny_chat import write_model
from training_runs import StopAfter, assert_same_run, silent
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.stop import Interrupted, StopRequest
from v05.training.config import TrainConfig, make_config
from v05.training.metrics import read_metrics
from v05.training.model_config import ModelConfig, make_model_config
from v05.training.run import train_run
from v05.training.stream_config import StreamConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


TINY = TrainConfig(
    algorithm="v05:2",
    prior="constant",
    rollouts=384,
    rollouts_per_update=32,
    eval_every=128,
    heldout_samples=2,
    checkpoint_every=2,
    learning_rate=3e-2,
    micro_batches=2,
)


def settings_for(model: Path, data: Path, **options: Any) -> ModelConfig:
    given = dict(model=str(model), data=str(data), verifier="verifiers_for_tests:words", max_new_tokens=8)
    return ModelConfig(**given | dict(dtype="float32", heldout_share=0.25, device="cpu") | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_a_users_run_learns_and_goes_on_bit_for_bit(loss: str, data: Path, tmp_path: Path) -> None:
    model = settings_for(write_model(tmp_path / "model", tied=loss == "linear"), data, loss=loss)
    whole, part, stop = tmp_path / "whole", tmp_path / "part", StopRequest()

    summary = train_run(TINY, whole, tmp_path, StopRequest(), silent, model=model)
    with pytest.raises(Interrupted, match="after 160 of 384"):
        train_run(TINY, part, tmp_path, stop, StopAfter(stop, 160), model=model)
    for wrong, message in ((dict(max_new_tokens=9), "max_new_tokens is 9; allowed"), (dict(dtype="bfloat16"), "dtype")):
        other = dataclasses.replace(model, **wrong)
        with pytest.raises(InputError, match=message):
            train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=other)
    lines = data.read_text()
    for changed in (lines.replace("one plus two", "five plus two"), lines.replace("{", '{"hint": 1, ', 1)):
        data.write_text(changed)
        with pytest.raises(InputError, match="has changed since the run"):
            train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=model)
    data.write_text(lines)
    with pytest.raises(InputError, match="allowed when resuming"):
        train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True)
    train_run(TINY, part, tmp_path, StopRequest(), silent, resume=True, model=model)
    assert_same_run(whole, part)
    assert summary["heldout_before"][1] == 4
    updates = read_metrics(whole)[1:]
    assert any(line["reward_failures"] for line in updates)
    assert all(line["sampler_gap"] < 1e-5 for line in updates)
    assert sum(line["reward"] for line in updates[-3:]) > 0.2 + sum(line["reward"] for line in updates[:3])
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(whole / "policy").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert AutoTokenizer.from_pretrained(whole / "policy").chat_template


def test_the_command_trains_a_users_model_and_resumes(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'prior = "constant"\nheldout_samples = 2\nepochs = 1\n'
        '[model]\ndevice = "cpu"\nheldout_share = 0.25\nmax_prompt_tokens = 2\nreward_workers = 1\n'
    )
    model, output = write_model(tmp_path / "model", "llama"), tmp_path / "run"
    command = ["train", "--output", str(output), "--config", str(config), "--model", str(model), "--data", str(data)]
    command += ["--verifier", "exact", "--max-new-tokens", "4", "--rollouts", "32", "--rollouts-per-update", "16"]
    command += ["--template", "{prompt}", "--micro-batches", "2"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError), result.output
    assert "0 problems" in str(result.exception)  # a chat of one word has 3 tokens
    config.write_text(config.read_text().replace("tokens = 2\n", "tokens = 5\n"))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "rollouts spent" in result.output
    assert json.loads((output / "config.json").read_text())["learning_rate"] == 1e-6
    assert json.loads((output / "model.json").read_text())["dtype"] == "bfloat16"
    again = CliRunner().invoke(app, ["train", "--output", str(output), "--resume"])
    assert again.exit_code == 0, again.output
    assert "32" in again.output


def test_a_reward_range_is_an_option_and_what_got_no_reward_is_in_the_table(data: Path, tmp_path: Path) -> None:
    model, output = write_model(tmp_path / "model"), tmp_path / "run"
    command = ["train", "--output", str(output), "--model", str(model), "--data", str(data), "--rollouts", "64"]
    command += ["--max-new-tokens", "8", "--dtype", "float32", "--prior", "constant", "--rollouts-per-update", "32"]
    config = tmp_path / "run.toml"
    config.write_text('heldout_samples = 48\n[model]\ndevice = "cpu"\nheldout_share = 0.5\n')
    command += ["--config", str(config)]
    wrong = CliRunner().invoke(app, [*command, "--verifier", "verifiers_for_tests:no_record"])
    assert isinstance(wrong.exception, InputError), wrong.output
    assert "gave no reward for any of its first 64 answers; last: TypeError" in str(wrong.exception)
    command += ["--verifier", "verifiers_for_tests:signed"]  # needs no --overwrite: nothing had been learnt
    result = CliRunner().invoke(app, [*command, "--reward-range", "-1", "1"])
    assert result.exit_code == 0, result.output
    saved = json.loads((output / "model.json").read_text())
    assert (saved["reward_low"], saved["reward_high"]) == (-1.0, 1.0)
    lines = read_metrics(output)
    kinds = ("heldout_failures", "reward_failures")
    failures = {kind: sum(line.get(kind, 0) for line in lines) for kind in kinds}
    assert all(failures.values())
    assert json.loads((output / "summary.json").read_text())["reward_failures"] == sum(failures.values())
    assert f"{sum(failures.values())} failures, 0 timeouts" in result.output
    again = CliRunner().invoke(app, ["train", "--output", str(output), "--resume", "--reward-range", "0", "1"])
    assert "reward_low is 0.0; allowed when resuming" in str(again.exception)


def test_settings_of_a_users_model(tmp_path: Path) -> None:
    assert make_model_config({}, {}, "nowhere") is None
    config = make_model_config({"model": "m", "loss": "logits"}, {"data": "math500"}, "run.toml")
    assert config is not None
    assert (config.model, config.loss, config.source.place) == ("m", "logits", "HuggingFaceH4/MATH-500")
    assert dataclasses.replace(config, template="{prompt}!").source.template == "{prompt}!"
    file = tmp_path / "run.toml"
    file.write_text('seed = 3\n[model]\nmodel = "m"\n')
    assert make_config(file).seed == 3
    for given, message in (
        ({"model": "m"}, "data is ''; allowed: a name"),
        ({"model": "m", "data": "d", "modle": "x"}, "unknown key 'modle'"),
        ({"model": "m", "data": "d", "heldout_share": 1.0}, "allowed: above 0 and below 1"),
        ({"model": "m", "data": "d", "loss": "cubic"}, "allowed: linear, logits"),
        ({"model": "m", "data": "d", "reward_high": -1.0}, "allowed: above 0"),
        ({"model": "m", "data": "d", "reward_low": -math.inf}, "reward_low is -inf; allowed: a finite number"),
        ({"model": "m", "data": "d", "max_new_tokens": 0}, "1 or more"),
        ({"model": "m", "data": "d", "gradient_checkpointing": 1}, "allowed: bool"),
    ):
        with pytest.raises(InputError, match=message):
            make_model_config({}, given, "")


def test_answers_longer_than_the_models_positions_are_refused(data: Path, tmp_path: Path) -> None:
    model = settings_for(write_model(tmp_path / "model"), data, max_new_tokens=64)
    with pytest.raises(InputError, match="64 positions, of which the longest prompt takes 5"):
        train_run(TINY, tmp_path / "run", tmp_path, StopRequest(), silent, model=model)


def test_an_engine_is_stopped_where_no_trainer_can_be_made_of_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(TransformersEngine):
        times = 0

        def close(self) -> None:
            Closed.times += 1

    monkeypatch.setattr("v05.training.run.make_engine", lambda name, policy, *rest, **options: Closed(policy))
    model, config = settings_for(write_model(tmp_path / "model"), data), dataclasses.replace(TINY, algorithm="dapo:4")
    with pytest.raises(InputError, match="which drops equal groups"):
        train_run(config, tmp_path / "run", tmp_path, StopRequest(), silent, model=model, stream=StreamConfig("stream"))
    assert Closed.times == 1
