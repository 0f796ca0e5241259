"""Evaluations: what is sampled and judged, and runs that go on after a stop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import write
from tiny_chat import write_model
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.evaluate import Sampling, evaluate, summarise
from v05.policy import Policy
from v05.rollout.engine import Rollout
from v05.rollout.hf import TransformersEngine
from v05.stop import Interrupted, StopRequest
from v05.tasks.pool import RewardPool
from v05.training.pretrained import load_policy


class Scripted:
    """Answers each prompt with numbers that follow from prompt and seed, and counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(
        self, prompts: list[str], counts: list[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Return answers, the last of them cut off."""
        self.asked += prompts
        return [
            [
                Rollout((0,), (1, 2), (-1.0, -1.0), str((seed // 7 + len(prompt) + row) % 3), row < count - 1)
                for row in range(count)
            ]
            for prompt, count in zip(prompts, counts, strict=True)
        ]

    def update_weights(self, weights: Any) -> None:
        """Do nothing."""


RECORDS = [{"prompt": "p" * (number + 1), "answer": "1"} for number in range(7)]


def test_a_stopped_evaluation_goes_on_and_repeats_no_finished_problem(tmp_path: Path) -> None:
    sampling = Sampling(samples=4, batch=2)
    with RewardPool("exact") as pool:
        whole = evaluate(Scripted(), RECORDS, pool, sampling, tmp_path / "whole", {}, StopRequest())
        stop, engine = StopRequest(), Scripted()

        def stop_after_two(done: int, total: int) -> None:
            stop.requested = done >= 2

        with pytest.raises(Interrupted, match="4 of 7 problems"):
            evaluate(engine, RECORDS, pool, sampling, tmp_path / "part", {}, stop, stop_after_two)
        results = tmp_path / "part" / "results.jsonl"
        lines = results.read_text().splitlines(keepends=True)
        results.write_text("".join(lines[:3]) + lines[3][:20])  # as after a crash while a line was written
        engine = Scripted()
        again = evaluate(engine, RECORDS, pool, sampling, tmp_path / "part", {}, StopRequest())
        assert engine.asked == [record["prompt"] for record in RECORDS[2:]]
        assert again == whole
        rows = [
            [
                json.loads(line)
                for line in (tmp_path / name / "results.jsonl").read_text().splitlines()
                if line[-1] == "}"
            ]
            for name in ("whole", "part")
        ]
        assert rows[0] == rows[1]
        assert [row["problem"] for row in rows[0]] == list(range(7))
        engine = Scripted()
        assert evaluate(engine, RECORDS, pool, sampling, tmp_path / "part", {}, StopRequest()) == whole
        assert engine.asked == []
        with pytest.raises(InputError, match="samples is 5 and was 4"):
            evaluate(engine, RECORDS, pool, Sampling(samples=5, batch=2), tmp_path / "part", {}, StopRequest())
        with pytest.raises(InputError, match="problems is"):
            evaluate(engine, RECORDS[:6], pool, sampling, tmp_path / "part", {}, StopRequest())


def test_completions_are_kept_on_the_disk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed = []
    monkeypatch.setattr("v05.evaluate.summarise", lambda rows, scale: summed.extend(rows) or summarise(rows, scale))
    with RewardPool("exact") as pool:
        for _ in range(2):  # the second reads what the first wrote
            evaluate(Scripted(), RECORDS, pool, Sampling(samples=4), tmp_path, {}, StopRequest())
    assert len(summed) == 2 * len(RECORDS)
    assert not any({"prompt", "completions"} & row.keys() for row in summed)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [len(row["completions"]) for row in rows] == [4] * len(RECORDS)


def test_the_summary_is_what_the_lines_say(tmp_path: Path) -> None:
    with RewardPool("exact", (-1.0, 1.0)) as pool:
        found = evaluate(Scripted(), RECORDS, pool, Sampling(samples=4), tmp_path, {}, StopRequest())
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row in rows:
        expected = [
            1.0 if text == "1" and done else -1.0
            for text, done in zip(row["completions"], row["finished"], strict=True)
        ]
        assert row["rewards"] == expected
        assert row["finished"] == [True, True, True, False]
    right = [row["rewards"].count(1.0) for row in rows]
    assert found.right == tuple(right)
    assert found.mean.value == pytest.approx(np.mean([row["rewards"] for row in rows]))
    assert found.passed[1].value == pytest.approx(np.mean(right) / 4)
    assert found.passed[4].value == pytest.approx(np.mean([count > 0 for count in right]))
    assert (found.unfinished, found.tokens, found.failures) == (0.25, 2.0, 0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["pass@4"][0] == found.passed[4].value


def test_the_command_evaluates_a_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    rows = [{"prompt": f"{word} plus one", "answer": "two"} for word in ("one", "two", "three")]
    data = write(tmp_path / "data.jsonl", *rows)
    command = ["evaluate", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]
    command += ["--samples", "8", "--max-new-tokens", "3", "--verifier", "exact", "--device", "cpu", "--batch", "2"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "mean@8" in first.output
    assert "pass@8" in first.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [len(row["completions"]) for row in rows] == [8, 8, 8]
    assert (tmp_path / "out" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, command)
    assert [line for line in again.output.splitlines() if "@" in line] == [
        line for line in first.output.splitlines() if "@" in line
    ]
    long = CliRunner().invoke(app, [*command, "--max-new-tokens", "62"])
    assert "64 positions, of which the longest prompt takes 5" in str(long.exception)
    other = CliRunner().invoke(app, [*command, "--temperature", "0.5"])
    assert isinstance(other.exception, InputError)
    assert "temperature is 0.5 and was 1.0" in str(other.exception)
    write_model(model, seed=1)
    assert "weights is" in str(CliRunner().invoke(app, command).exception)
    write_model(model)
    mine = tmp_path / "mine.py"
    command += ["--verifier", f"{mine}:score", "--output", str(tmp_path / "mine")]
    for reward, message in ((1.0, ""), (0.0, "verifier_text is")):
        mine.write_text(f"def score(prompt, completion, record):\n    return {reward}\n")
        result = CliRunner().invoke(app, command)
        assert message in str(result.exception or "")
        assert (result.exit_code == 0) is not bool(message)
    mine.write_text("def score(prompt, completion, record):\n    return 1.0\n")
    Path(data).write_text(Path(data).read_text().replace("{", '{"hint": 1, '))
    assert CliRunner().invoke(app, [*command, "--verifier", "exact", "--output", str(tmp_path / "out")]).exit_code == 0
    assert "columns is" in str(CliRunner().invoke(app, command).exception)  # which a verifier of one's own may read


def test_an_engine_that_loads_the_model_itself_has_the_device_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Policy:
        asked["device"] = options["device"]
        return load_policy(name, **options)

    def engine(name: str, policy: Policy, **options: Any) -> TransformersEngine:
        asked.update(options, name=name)
        assert options["options"] == {"block_size": 32, "timeout": 5}
        return TransformersEngine(policy)

    monkeypatch.setattr("v05.training.pretrained.load_policy", load)
    monkeypatch.setattr("v05.training.engines.make_engine", engine)
    data = write(tmp_path / "data.jsonl", {"prompt": "one plus one", "answer": "two"})
    command = ["evaluate", "--model", str(write_model(tmp_path / "model")), "--data", str(data), "--engine", "vllm"]
    command += ["--output", str(tmp_path / "out"), "--samples", "2", "--max-new-tokens", "3", "--verifier", "exact"]
    command += ["--engine-options", '{"block_size": 32, "timeout": 5}']
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (asked["name"], asked["device"], asked["longest"]) == ("vllm", "cpu", 5 + 3)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["engine_options"] == {"block_size": 32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "cannot be loaded"),
        (["--model", "./nowhere"], "model is './nowhere', no folder"),
        (["--engine", "magic"], "allowed: hf"),
        (["--engine-options", "[1]"], "engine_options is '[1]'; allowed: a JSON object"),
        (["--dtype", "int3"], "allowed: float32, bfloat16"),
        (["--device", "quantum"], "allowed: auto, cpu"),
        (["--verifier", "magic"], "allowed: exact, math"),
        (["--samples", "0"], "samples is 0"),
        (["--reward-timeout", "inf"], "inf s; allowed: 1 or more, above 0 and finite"),
        (["--reward-range", "1", "0"], "--reward-range is 1 0; allowed"),
        (["--reward-range", "0", "inf"], "--reward-range is 0 inf; allowed"),
        (["--temperature", "0"], "temperature is 0"),
        (["--data", "missing.jsonl"], "No such file"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: list[str], message: str) -> None:
    data = write(tmp_path / "data.jsonl", {"prompt": "one", "answer": "two"})
    command = ["evaluate", "--model", str(tmp_path), "--data", str(data), "--output", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()
