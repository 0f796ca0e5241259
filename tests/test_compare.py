"""Comparisons: same start, same seeds, same rollouts; finished runs are kept."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from training_runs import silent
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.estimates import HeldOut, binomial_interval
from v05.stop import Interrupted, StopRequest
from v05.training.compare import Curve, compare, comparison, reference_of
from v05.training.config import TrainConfig
from v05.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TrainConfig(
    policy="tiny",
    prior="history",
    rollouts=96,
    rollouts_per_update=32,
    eval_every=32,
    heldout_prompts=8,
    heldout_samples=2,
    warm_start_steps=3,
)


def test_runs_share_start_and_budget_and_are_not_repeated(tmp_path: Path) -> None:
    curves = compare(TINY, ["v05", "grpo:16", "reinforce"], [0, 1], tmp_path, StopRequest(), silent)
    assert [curve.name for curve in curves] == ["v05", "grpo:16", "reinforce"]
    assert all(curve.rollouts == (0, 32, 64, 96) and curve.accuracy.shape == (2, 4) for curve in curves)
    assert len({curve.accuracy[seed, 0] for curve in curves for seed in (0, 1)}) == 1
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["target"]["algorithm"] == "grpo:16"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "warm_start").iterdir())) == 1
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/summary.json")}
    again = compare(TINY, ["v05", "grpo:16", "reinforce"], [0, 1], tmp_path, StopRequest(), silent)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert all(np.array_equal(first.accuracy, second.accuracy) for first, second in zip(curves, again, strict=True))
    changed = dataclasses.replace(TINY, learning_rate=0.5)
    with pytest.raises(InputError, match="learning_rate is"):
        compare(changed, ["v05"], [0], tmp_path, StopRequest(), silent)


def test_rollouts_to_a_target_are_interpolated_on_the_mean() -> None:
    curve = Curve("a", (0, 100, 200), np.array([[0.1, 0.2, 0.6], [0.1, 0.4, 0.4]]))
    assert curve.final == pytest.approx(0.5)
    assert curve.rollouts_to(0.2) == pytest.approx(50.0)
    assert curve.rollouts_to(0.4) == pytest.approx(150.0)
    assert curve.rollouts_to(0.05) == 0.0
    assert curve.rollouts_to(0.51) is None
    reference = Curve("grpo:16", (0, 100, 200), np.array([[0.1, 0.2, 0.3]]))
    assert reference_of([curve, reference]) is reference
    assert reference_of([reference, curve]) is reference
    assert comparison([curve, reference], [0], TINY)["rollouts_to_target"]["a"] == pytest.approx(100.0)


@pytest.mark.parametrize(("names", "seeds"), [([], [0]), (["v05", "v05"], [0]), (["v05"], []), (["v05"], [1, 1])])
def test_nothing_and_doubles_are_refused(tmp_path: Path, names: list[str], seeds: list[int]) -> None:
    with pytest.raises(InputError, match="one or more, all different"):
        compare(TINY, names, seeds, tmp_path, StopRequest(), silent)


def test_the_interval_of_a_share() -> None:
    low, high = binomial_interval(10, 100)
    assert (low, high) == (pytest.approx(0.0552, abs=1e-4), pytest.approx(0.1744, abs=1e-4))
    assert binomial_interval(0, 10)[0] == 0.0
    assert binomial_interval(10, 10)[1] == pytest.approx(1.0)


@pytest.mark.parametrize("alike", [0.3, 1.0, 1e6])
def test_intervals_of_held_out_answers_hold_where_those_to_a_prompt_are_alike(alike: float) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        chances = rng.beta(0.4 * alike, 0.6 * alike, 256)
        right, total, worth = HeldOut.of(rng.binomial(4, chances).tolist(), 4)
        low, high = binomial_interval(worth * right / total, worth)
        covered += low <= 0.4 <= high
    assert 0.93 <= covered / 400 <= 0.98


def test_what_held_out_answers_are_worth_by_hand() -> None:
    assert HeldOut.of([4, 0, 4, 0], 4) == (8, 16, 4)
    assert HeldOut.of([2, 2, 2, 1], 4)[2] == 16
    assert HeldOut.of([0, 0], 4) == (0, 8, 2)
    assert HeldOut.of([1], 4) == (1, 4, 1)


def write_config(folder: Path) -> Path:
    file = folder / "settings.json"
    file.write_text(json.dumps({name: value for name, value in TINY.to_dict().items() if name != "rollouts"}))
    return file


def test_one_run_from_the_command_line(tmp_path: Path) -> None:
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(write_config(tmp_path)), "--threads", "1"]
    result = CliRunner().invoke(app, [*command, "--rollouts", "64"])
    assert result.exit_code == 0, result.output
    for expected in ("held-out accuracy before", "95 % interval", "rollouts spent", "conflicts found", "metrics.jsonl"):
        assert expected in result.output
    assert re.search(r"rollouts spent +│? +64", result.output)
    assert [line["rollouts"] for line in read_metrics(tmp_path / "run")] == [0, 32, 64]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, [*command, "--rollouts", "64"])
    assert isinstance(again.exception, InputError)
    assert CliRunner().invoke(app, ["train", "--output", str(tmp_path / "run"), "--resume"]).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--rollouts", "32", "--overwrite"]).exit_code == 0
    assert [line["rollouts"] for line in read_metrics(tmp_path / "run")] == [0, 32]


def test_a_comparison_from_the_command_line(tmp_path: Path) -> None:
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(write_config(tmp_path)), "--threads", "1"]
    result = CliRunner().invoke(app, [*command, "--rollouts", "64", "--compare", "dr_grpo:4,spo", "--seeds", "3"])
    assert result.exit_code == 0, result.output
    for expected in ("v05_from_one", "dr_grpo:4", "spo", "rollouts to spo's end", "files: "):
        assert expected in result.output
    assert sorted(path.name for path in (tmp_path / "run" / "runs").iterdir()) == [
        "dr_grpo-4-seed3",
        "spo-seed3",
        "v05_from_one-seed3",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--compare"),
        (["--compare", "grpo", "--seeds", "a"], "whole numbers"),
        (["--resume", "--overwrite"], "one of them"),
        (["--resume"], "has no run; allowed with --resume alone: the folder of one"),
        (["--resume", "--rollouts", "64", "--seed", "1"], "has no run; allowed with --resume alone"),
        (["--threads", "0"], "--threads is 0"),
        (["--algorithm", "ppo"], "algorithm is 'ppo'"),
        (["--config", "nowhere.toml"], "does not exist"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", "--output", str(tmp_path), *options])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_resume_with_a_whole_configuration_starts_where_there_is_no_run(tmp_path: Path) -> None:
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(write_config(tmp_path)), "--resume"]
    for _ in range(2):  # as a script does that is queued again
        result = CliRunner().invoke(app, [*command, "--rollouts", "32"])
        assert result.exit_code == 0, result.output


def test_the_demo_starts_where_there_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of `make demo`, up to the run itself, which takes minutes."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"^demo:.*\n\t\S+/v05 (train .*)$", makefile, re.MULTILINE)
    assert command
    begun: list[TrainConfig] = []

    def run(config: TrainConfig, *rest: object, **options: object) -> None:
        begun.append(config)
        raise Interrupted("the demo begins")

    monkeypatch.setattr("v05.cli.train.train_run", run)
    result = CliRunner().invoke(app, command[1].replace("runs/demo", str(tmp_path / "run")).split())
    assert result.exit_code == 130, result.output
    assert begun == [TrainConfig()]
