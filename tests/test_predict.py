"""`v05 predict`: lines in, lines out, bad lines, measures where scores are known, and what a user sees."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from records import read_lines
from tiny_models import LettersEmbedder

from v05.errors import BadLine, InputError
from v05.predict import predict_file
from v05.value.measure import Reliability, auc, correlation, grouped_auc, pair_accuracy, reliability
from v05.value.model import V0

EASY = [f"compute {a}+{b}" for a in range(1, 9) for b in range(1, 6)]
HARD = [f"find all primes p such that p+{a} is {b} times a square" for a in range(2, 10) for b in range(5)]
CONTEXT = [{"prompt": text, "score": 1.0} for text in EASY[:20]] + [{"prompt": t, "score": -1} for t in HARD[:20]]
QUERIES = [{"prompt": EASY[30], "score": 0.8, "id": [1]}, {"prompt": HARD[30], "score": -0.6}, {"prompt": HARD[31]}]


@pytest.fixture
def model() -> V0:
    return V0.embedded(embedder=LettersEmbedder())


def write(path: Path, lines: list) -> Path:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_measures_by_hand() -> None:
    prediction = np.array([0.1, 0.4, 0.4, 0.8])
    assert auc(prediction, np.array([False, False, True, True])) == pytest.approx(3.5 / 4)
    assert np.isnan(auc(prediction, np.ones(4, dtype=bool)))
    assert pair_accuracy(prediction, np.array([0.0, 0.2, 0.4, 0.4])) == pytest.approx(4 / 5)
    group = np.array([0, 0, 1, 1])
    assert grouped_auc(prediction, np.array([False, True, True, True]), group) == 1.0
    assert correlation(prediction, -prediction) == pytest.approx(-1)
    assert np.isnan(correlation(prediction, np.ones(4)))
    curve = reliability(np.array([0.2, 0.0, 0.9, 0.7]), np.array([0.5, 0.1, 1.0, 0.4]), bins=2)
    assert curve.predicted == pytest.approx([0.1, 0.8])
    assert curve.observed == pytest.approx([0.3, 0.7])
    assert curve.gap == pytest.approx(0.15)
    halves = reliability(np.zeros(4), np.array([0.0, 0.0, 1.0, 1.0]), bins=1)
    assert halves.error == pytest.approx([math.sqrt(4 * 0.25 / 3 / 4)])
    bins = Reliability(np.array([0.1, 0.9]), np.array([0.2, 0.5]), np.zeros(2), np.array([1, 3]))
    assert bins.gap == pytest.approx((1 * 0.1 + 3 * 0.4) / 4)


def test_auc_equals_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    prediction, success = rng.integers(0, 9, 60) / 9, rng.random(60) < 0.4
    first, second = prediction[success][:, None], prediction[~success]
    assert auc(prediction, success) == pytest.approx(np.mean((first > second) + 0.5 * (first == second)))


def test_lines_get_a_probability_and_scores_are_compared(model: V0, tmp_path: Path) -> None:
    context, queries = write(tmp_path / "context.jsonl", CONTEXT), write(tmp_path / "queries.jsonl", QUERIES)
    read: list[int] = []
    summary = predict_file(model, context, str(queries), tmp_path / "out.jsonl", on_bytes=read.append)
    lines = read_lines(tmp_path / "out.jsonl")
    assert [{k: v for k, v in line.items() if k != "probability"} for line in lines] == QUERIES
    scores = torch.tensor([float(line["score"]) for line in CONTEXT])
    expected = model.predict([line["prompt"] for line in CONTEXT], scores, [line["prompt"] for line in QUERIES])
    found = [line["probability"] for line in lines]
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert (summary.context, summary.prompts, len(summary.rate)) == (40, 3, 2)
    assert summary.auc == 1.0
    rewards = 2 * expected[:2] - 1 - torch.tensor([0.8, -0.6])
    assert summary.squared_error == pytest.approx(float(rewards.square().mean()), abs=1e-5)
    assert read[-1] == queries.stat().st_size


def test_what_the_context_tells_is_not_judged(model: V0, tmp_path: Path) -> None:
    told = [{**line, "score": -line["score"]} for line in CONTEXT[:10]]
    context, queries = write(tmp_path / "c.jsonl", CONTEXT), write(tmp_path / "q.jsonl", [*told, *QUERIES])
    summary = predict_file(model, context, str(queries), tmp_path / "out.jsonl")
    assert (summary.prompts, len(summary.rate), summary.auc) == (13, 2, 1.0)
    assert len(read_lines(tmp_path / "out.jsonl")) == 13


def test_rewards_of_another_range(model: V0, tmp_path: Path) -> None:
    halved = [{**line, "score": (line["score"] + 1) / 2} for line in CONTEXT]
    outputs = []
    for name, lines, scale in (("a", CONTEXT, (-1.0, 1.0)), ("b", halved, (0.0, 1.0))):
        queries = write(tmp_path / "queries.jsonl", [{"prompt": EASY[30]}])
        predict_file(model, write(tmp_path / name, lines), str(queries), tmp_path / f"{name}.out", scale)
        outputs.append(read_lines(tmp_path / f"{name}.out")[0]["probability"])
    assert outputs[0] == pytest.approx(outputs[1], abs=1e-6)


@pytest.mark.parametrize(
    ("where", "line", "reason"),
    [
        ("context", {"prompt": "a"}, "key 'score' is missing"),
        ("context", {"prompt": "a", "score": 2}, "score is 2; allowed: -1 to 1"),
        ("context", {"prompt": "a", "score": "1"}, 'score is "1"; allowed: a number'),
        ("queries", "{broken\n", "not JSON"),
        ("queries", {"prompt": 4}, "prompt is 4; allowed: a string"),
        ("queries", {"prompt": "a", "score": -3}, "score is -3"),
        ("queries", {"text": "a"}, "key 'prompt' is missing"),
        ("queries", {"prompt": "é\ud83d"}, "prompt has half a surrogate pair at character 1"),
        ("context", {"prompt": "\ud83d", "score": 1}, "prompt has half a surrogate pair at character 0"),
    ],
)
def test_bad_lines_stop_it_or_are_set_aside(model: V0, tmp_path: Path, where: str, line: object, reason: str) -> None:
    lines = {"context": list(CONTEXT), "queries": list(QUERIES)}
    lines[where].insert(1, line)
    context, queries = (write(tmp_path / f"{name}.jsonl", lines[name]) for name in ("context", "queries"))
    with pytest.raises(BadLine, match=rf"{where}.jsonl:2: {reason}"):
        predict_file(model, context, str(queries), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    summary = predict_file(model, context, str(queries), tmp_path / "out.jsonl", skip_bad=True)
    assert (summary.bad_lines, summary.prompts) == (1, 3)
    aside = read_lines(tmp_path / ("out.context.bad.jsonl" if where == "context" else "out.bad.jsonl"))
    assert aside[0]["line"] == 2
    assert reason in aside[0]["reason"]


def test_files_that_are_not_allowed(model: V0, tmp_path: Path, monkeypatch) -> None:
    queries = str(write(tmp_path / "queries.jsonl", QUERIES))
    with pytest.raises(InputError, match="has no outcome"):
        predict_file(model, write(tmp_path / "empty.jsonl", []), queries, tmp_path / "out.jsonl")
    for wrong in ((1.0, -1.0), (-1.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(InputError, match=r"--reward-range is .* both finite"):
            predict_file(model, write(tmp_path / "context.jsonl", CONTEXT), queries, tmp_path / "out.jsonl", wrong)
    with pytest.raises(InputError, match="No such file"):
        predict_file(model, tmp_path / "absent.jsonl", queries, tmp_path / "out.jsonl")
    with monkeypatch.context() as patched:
        patched.setattr("v05.value.head.LARGEST", 39, raising=False)
        with pytest.raises(InputError, match=r"have 40 outcomes; allowed: 39, such as"):
            predict_file(model, write(tmp_path / "context.jsonl", CONTEXT), queries, tmp_path / "out.jsonl")
    assert (
        predict_file(
            model, write(tmp_path / "context.jsonl", CONTEXT), str(write(tmp_path / "none", [])), tmp_path / "out.jsonl"
        ).prompts
        == 0
    )


def test_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    context, queries = write(tmp_path / "c.jsonl", CONTEXT[::3]), write(tmp_path / "q.jsonl", QUERIES)
    arguments = ("predict", "--context", context, "--prompts", queries, "--cache", tmp_path / "cache.sqlite")
    plot = tmp_path / "plot.png"
    status, table, _ = run(capsys, monkeypatch, *arguments, "--output", tmp_path / "out.jsonl", "--plot", plot)
    assert status == 0
    assert "1.0000" in table  # AUC
    assert "calibration gap" in table
    assert plot.read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "out.jsonl").read_text()
    status, lines, errors = run(capsys, monkeypatch, *arguments)
    assert (status, lines) == (0, first)
    assert "AUC" in errors
    (tmp_path / "empty.pt").touch()
    for wrong in (
        ("--head", "x"),
        ("--checkpoint", tmp_path / "absent.pt"),
        ("--checkpoint", tmp_path / "empty.pt"),
        ("--reward-range", 1, 0),
        ("--cache-gib", "inf"),
        ("--cache", context / "cache"),
        ("--background", tmp_path),
        ("--device", "cuda"),
        ("--output", context / "out.jsonl"),
    ):
        assert run(capsys, monkeypatch, *arguments, *wrong)[0] == 2, wrong
    message = " ".join(run(capsys, monkeypatch, *arguments, "--device", "cuda")[2].split())
    assert "--device is cuda without --checkpoint; allowed: cpu, where the embedded V0 runs" in message
