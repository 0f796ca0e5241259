"""What may change when a run is resumed, what is noted of it, and a run that breaks down and is rescued."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import write_model
from training_runs import TINY, StopAfter, silent
from typer.testing import CliRunner

from v05.checkpoint import read_checkpoint
from v05.cli import app
from v05.errors import InputError
from v05.stop import Interrupted, StopRequest
from v05.training.config import TrainConfig
from v05.training.metrics import read_metrics
from v05.training.model_config import ModelConfig
from v05.training.run import train_run
from v05.training.settings import make_settings
from v05.training.stream_config import BATCHES, StreamConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("warm_start")


def train(folder: Path, cache: Path, stop_after: int = 10**9, **settings: Any) -> dict[str, Any]:
    """Train, or go on with `changes` allowed, and stop after so many rollouts."""
    stop, stream = StopRequest(), settings.pop("stream", BATCHES)
    config = dataclasses.replace(TINY, **settings)
    options = dict(resume=True, changes=True, stream=stream)
    return train_run(config, folder, cache, stop, StopAfter(stop, stop_after), **options)


def changes_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint.tensors["policy"]


@pytest.mark.parametrize("stream", [BATCHES, StreamConfig("stream", window=2)], ids=["batch", "stream"])
def test_a_finished_run_is_made_longer(stream: StreamConfig, cache: Path, tmp_path: Path) -> None:
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    train(whole, cache, stream=stream)
    assert train(longer, cache, rollouts=96, stream=stream)["rollouts"] <= 96
    updates = len(read_metrics(longer)) - 1
    summary = train(longer, cache, stream=stream)
    assert 96 < summary["rollouts"] <= 192
    assert changes_of(longer) == [{"update": updates, "rollouts": [96, 192]}]
    assert json.loads((longer / "config.json").read_text())["rollouts"] == 192
    assert not (whole / "changes.jsonl").exists()
    if not stream.streams:  # there the end of the first run left no update in flight
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(longer)[name])


def test_what_only_costs_or_watches_may_change_and_is_noted(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, cache, stop_after=64)
    for wrong, message in (
        (dict(rollouts=96), "rollouts is 96; allowed when resuming .*: 192 or more"),
        (dict(seed=1), "seed is 1; allowed when resuming .*: 0$"),
        (dict(learning_rate=1e-4, cost=0.5), "cost is 0.5; allowed when resuming"),
    ):
        with pytest.raises(InputError, match=message):
            train(tmp_path, cache, **wrong)
    assert not (tmp_path / "changes.jsonl").exists()
    with pytest.raises(Interrupted):
        train(tmp_path, cache, stop_after=96, learning_rate=1e-4, checkpoint_every=1)
    new = dict(learning_rate=1e-5, checkpoint_every=1, micro_batches=2, eval_every=32)
    train(tmp_path, cache, **new)
    assert changes_of(tmp_path) == [
        {"update": 2, "learning_rate": [2e-4, 1e-4], "checkpoint_every": [2, 1]},
        {"update": 3, "learning_rate": [1e-4, 1e-5], "micro_batches": [1, 2], "eval_every": [64, 32]},
    ]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in new} == new
    assert train(tmp_path, cache, **new)["rollouts"] == 192
    with pytest.raises(InputError, match=r"learning_rate is 0.5; .*: 1e-05, unless rollouts are more"):
        train(tmp_path, cache, **new | dict(learning_rate=0.5))


def test_the_rate_in_an_algorithms_name_may_change_and_nothing_else_of_it(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, cache, stop_after=64, algorithm="dr_grpo:4@1e-3")
    with pytest.raises(InputError, match=r"algorithm is 'dr_grpo:8@1e-4'; allowed when resuming .*: 'dr_grpo:4@1e-3'"):
        train(tmp_path, cache, algorithm="dr_grpo:8@1e-4")
    train(tmp_path, cache, algorithm="dr_grpo:4@1e-4")
    assert changes_of(tmp_path) == [{"update": 2, "algorithm": ["dr_grpo:4@1e-3", "dr_grpo:4@1e-4"]}]


def test_progress_says_what_is_dropped(cache: Path, tmp_path: Path) -> None:
    config, notes = dataclasses.replace(TINY, algorithm="dapo:2", rollouts=64), list[str]()
    summary = train_run(config, tmp_path, cache, StopRequest(), lambda stage, done, total, note: notes.append(note))
    lines = read_metrics(tmp_path)[1:]
    dropped, kept = (sum(line[name] for line in lines) for name in ("dropped", "kept"))
    assert (summary["dropped"], summary["rollouts"]) == (dropped, dropped + kept)
    assert summary["rollouts_per_prompt"] == kept / max(1, sum(line["prompts"] for line in lines))
    assert notes[-1].endswith(f", {dropped / 64:.0%} dropped")


def test_nothing_changes_unless_it_is_asked_for(cache: Path, tmp_path: Path) -> None:
    train(tmp_path, cache, rollouts=32)
    with pytest.raises(InputError, match=r"rollouts is 192; allowed when resuming .*: 32$"):
        train_run(TINY, tmp_path, cache, StopRequest(), lambda *_: None, resume=True)


@pytest.mark.parametrize("spoilt", ["gradient", "policy"])
def test_a_run_that_breaks_down_says_where_it_can_go_on(
    spoilt: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(TINY.to_dict()))
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(config), "--resume"]
    if spoilt == "gradient":
        monkeypatch.setattr("v05.training.learner.Learner._clip", lambda learner: float("nan"))
    else:
        command += ["--learning-rate", "1e30"]
    broken = CliRunner().invoke(app, command)
    assert isinstance(broken.exception, InputError), broken.output
    [message] = str(broken.exception).splitlines()
    assert ("gradient's norm is nan" if spoilt == "gradient" else "logits are not finite") in message
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert f"saved in {newest}" in message
    assert "--resume repeats this, unless learning_rate" in message
    monkeypatch.undo()
    command = ["train", "--output", str(tmp_path / "run"), "--resume", "--learning-rate", "1e-5"]
    assert CliRunner().invoke(app, command).exit_code == 0


def test_a_file_that_does_not_name_a_setting_leaves_it_as_it_was(cache: Path, tmp_path: Path) -> None:
    """Settings without an option are changed by --config, which need not repeat what the run was started with."""
    train(tmp_path, cache, learning_rate=1e-3)
    kept = {name: value for name, value in TINY.to_dict().items() if name not in ("learning_rate", "rollouts")}
    file = tmp_path / "other.json"
    file.write_text(json.dumps(kept | {"eval_every": 32}))
    settings = make_settings(file, tmp_path, True, {"rollouts": 256}, {}, {})
    assert (settings.config.learning_rate, settings.config.rollouts, settings.config.eval_every) == (1e-3, 256, 32)
    assert make_settings(file, tmp_path / "new", True, {}, {}, {}).config.learning_rate == TrainConfig.learning_rate


def test_a_rate_that_the_algorithm_would_not_take_is_refused(cache: Path, tmp_path: Path) -> None:
    train(tmp_path, cache, algorithm="v05@1e-3")
    with pytest.raises(InputError, match="learning_rate is given with v05@1e-3; allowed: the rate in its name"):
        train(tmp_path, cache, algorithm="v05@1e-3", rollouts=256, learning_rate=1e-5)


def test_a_verifier_whose_file_changes_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, verifier = tmp_path / "sums.jsonl", tmp_path / "judge.py"
    data.write_text("".join(json.dumps({"prompt": f"one plus {word}"}) + "\n" for word in ("one", "two", "three")))
    verifier.write_text("def judge(prompt, completion, record):\n    return float('t' in completion)\n")
    given: dict[str, Any] = dict(data=str(data), verifier=f"{verifier}:judge", max_new_tokens=4, device="cpu")
    model = ModelConfig(model=str(write_model(tmp_path / "model")), **given)
    config = TrainConfig(prior="constant", rollouts=32, rollouts_per_update=8, heldout_samples=1, checkpoint_every=1)
    options: dict[str, Any] = dict(model=model, resume=True)

    def go_on(rollouts: int) -> None:
        stop = StopRequest()
        with pytest.raises(Interrupted):
            train_run(config, tmp_path / "run", tmp_path, stop, StopAfter(stop, rollouts), **options)

    go_on(8)
    go_on(16)
    assert not (tmp_path / "run" / "changes.jsonl").exists()
    verifier.write_text(verifier.read_text().replace("'t'", "'w'"))
    go_on(24)
    (line,) = changes_of(tmp_path / "run")
    assert (line["update"], line.keys()) == (2, {"update", "verifier_file"})
    assert len(set(line["verifier_file"])) == 2
    assert "verifier_file was" in caplog.text
    train_run(config, tmp_path / "run", tmp_path, StopRequest(), silent, **options)
    assert len(changes_of(tmp_path / "run")) == 1
