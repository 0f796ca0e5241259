"""`v05 study prior`: nothing sees a test prompt, the bootstrap is what it says, and the published records."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from records import v0_folder
from tiny_models import LettersEmbedder

from v05.cli import main
from v05.cli.study import summarise
from v05.errors import BadLine, InputError
from v05.files import finite
from v05.scored import Scored, by_policy, read_scored, to_record
from v05.studies.prior import EMBEDDED, Outcomes, Scores, cross_predict, outcomes_of, predictors_of
from v05.studies.rivals import describer
from v05.value.model import V0, Record

TEXTS = [f"compute {a}+{b} of {'many primes' if a % 2 else 'x'}" for a in range(10) for b in range(6)]
ROWS = [
    Scored(text, (1.0 if (number // 6) % 2 else -1.0) * (0.6 if policy == "a" else 0.9), policy, "m", step)
    for policy, step in (("a", 1), ("b", 2))
    for number, text in enumerate(TEXTS)
    if policy == "a" or number % 3
]


def test_no_model_ever_sees_a_test_prompt() -> None:
    data = outcomes_of(ROWS, (-1.0, 1.0), 5, 0)
    met: list[int] = []

    def suspicious(seen: Sequence[Record], wanted: Sequence[Sequence[str]]) -> list[np.ndarray]:
        trained = {prompt for own in seen for prompt in own.prompts}
        asked = {prompt for part in wanted for prompt in part}
        assert not trained & asked
        assert len(trained | asked) == len(TEXTS)
        met.append(sum(map(len, wanted)))
        return [np.full(len(part), 0.5) for part in wanted]

    found = cross_predict(data, {"suspicious": suspicious})["suspicious"]
    assert not np.isnan(found).any()
    assert (len(met), sum(met)) == (5, len(ROWS))
    assert np.bincount(data.fold).tolist() == [12] * 5


def test_folds_depend_on_text_and_seed_alone() -> None:
    first = outcomes_of(ROWS, (-1.0, 1.0), 4, 0)
    shuffled = outcomes_of(ROWS[::-1], (-1.0, 1.0), 4, 0)
    assert dict(zip(first.prompts, first.fold, strict=True)) == dict(zip(shuffled.prompts, shuffled.fold, strict=True))
    assert (outcomes_of(ROWS, (-1.0, 1.0), 4, 1).fold != first.fold).any()
    with pytest.raises(InputError, match=r"--folds is 1; allowed: 2 to 60"):
        outcomes_of(ROWS, (-1.0, 1.0), 1, 0)


def test_the_models_rank_what_can_be_ranked_and_no_noise() -> None:
    embedder = LettersEmbedder()

    def embed(texts: Sequence[str]) -> np.ndarray:
        return embedder.embed(list(texts)).last.numpy()

    models = predictors_of(V0.embedded(embedder=embedder), embed, alone=False)
    data = outcomes_of(ROWS, (-1.0, 1.0), 5, 0)
    scores = Scores(data, cross_predict(data, models), 2.0)
    assert scores.of(EMBEDDED)[0].min() > 0.95
    assert scores.of(EMBEDDED)[1].max() < 0.2
    assert scores.of("context mean")[0].tolist() == [0.5, 0.5]
    rng = np.random.default_rng(0)
    noise = [Scored(row.prompt, float(rng.choice([-1.0, 1.0])), row.policy) for row in ROWS]
    data = outcomes_of(noise, (-1.0, 1.0), 5, 0)
    scores = Scores(data, cross_predict(data, {EMBEDDED: models[EMBEDDED]}), 2.0)
    assert 0.25 < scores.of(EMBEDDED)[0].mean() < 0.75


@pytest.mark.parametrize("texts", [[*"abcdefgh"], [f"w{number}" for number in range(8)], ["", " ", *"!?+-*/"]])
def test_prompts_without_a_word_in_common_are_judged_by_their_sentence_vectors(texts: list[str]) -> None:
    def embed(given: Sequence[str]) -> np.ndarray:
        return np.array([[float(texts.index(text)), 1.0] for text in given]).reshape(-1, 2)

    rows = [Scored(text, number % 3 - 1.0, "a", "m", 0) for number, text in enumerate(texts)]
    data = outcomes_of(rows, (-1.0, 1.0), 2, 0)
    models = predictors_of(V0.embedded(embedder=LettersEmbedder()), embed, alone=False)
    found = cross_predict(data, {name: models[name] for name in models if name != EMBEDDED})
    assert np.array_equal(found["ridge, embedder + TF-IDF"], found["ridge, embedder"])
    assert all(np.isfinite(values).all() for values in found.values())


def test_a_word_counts_once_for_a_prompt_that_several_policies_answered() -> None:
    def embed(given: Sequence[str]) -> np.ndarray:
        return np.ones((len(given), 1))

    assert describer(["one two", "one two", "three four"], embed, words=True) is embed  # no word is in two prompts
    assert describer(["one two", "two three"], embed, words=True)(["one two"]).shape == (1, 2)


def test_the_bootstrap_draws_prompts_and_pairs_models() -> None:
    data = outcomes_of(ROWS, (-1.0, 1.0), 5, 0)
    rng = np.random.default_rng(0)
    guess = np.clip(data.rate + rng.normal(0, 0.5, len(data.rate)), 0, 1)
    scores = Scores(data, {"a": guess, "b": guess, "c": np.full(len(guess), 0.5)}, 2.0)
    draws = scores.bootstrap(60)
    assert np.array_equal(draws["a"], draws["b"])
    assert draws["a"][:, 0].std() > 0.005
    assert draws["a"].mean(0) == pytest.approx([values.mean() for values in scores.of("a")], abs=0.05)
    ones = np.ones(len(data.prompts), dtype=np.int64)
    assert [v.tolist() for v in scores.of("a", ones)] == [v.tolist() for v in scores.of("a")]


@pytest.mark.filterwarnings("error")
def test_intervals_leave_out_what_a_resample_does_not_have() -> None:
    """Two records of a policy are missing in one resample of seven; its one success in every third."""
    rng = np.random.default_rng(0)
    rows = [Scored(f"{number}", rng.random(), "many") for number in range(60)]
    data = outcomes_of([*rows, Scored("1", 0.9, "few"), Scored("2", 0.2, "few")], (0.0, 1.0), 2, 0)
    entry = summarise(Scores(data, {EMBEDDED: rng.random(len(data.rate))}, 1.0), 200)["models"][EMBEDDED]
    for name in ("auc", "squared_error"):
        low, high = entry[f"{name}_interval"]
        assert low < entry[name] < high
    alone = summarise(Scores(outcomes_of(rows, (0.0, 1.0), 2, 0), {EMBEDDED: rng.random(60)}, 1.0), 0)
    written = json.loads(json.dumps(finite(alone), allow_nan=False))["models"][EMBEDDED]
    assert written["residual_correlation_with_context_mean"] is None
    assert written["auc_by_policy"] == alone["models"][EMBEDDED]["auc_by_policy"]


def test_scores_by_hand() -> None:
    """Rewards from -1 to 1: an error of probability counts four times."""
    policy, prompt, rates = np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([0.9, 0.1, 0.75])
    data = Outcomes(["a", "b"], ["x", "y"], policy, prompt, rates, np.zeros(2, dtype=int))
    scores = Scores(data, {"m": np.array([0.5, 0.25, 0.5])}, 2.0)
    aucs, errors = scores.of("m")
    assert errors == pytest.approx([4 * (0.4**2 + 0.15**2) / 2, 4 * 0.25**2])
    assert aucs[0] == 1
    assert np.isnan(aucs[1])
    aucs, errors = scores.of("m", np.array([1, 3]))  # y drawn three times
    assert errors == pytest.approx([4 * (0.4**2 + 3 * 0.15**2) / 4, 4 * 0.25**2])


@pytest.mark.filterwarnings("error")
def test_residual_correlations_by_hand() -> None:
    policy, prompt = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    rates, names = np.array([0.9, 0.1, 0.7, 0.3]), ["a", "b", "without a record"]
    data = Outcomes(names, ["x", "y"], policy, prompt, rates, np.zeros(2, dtype=int))
    with_mean, with_difficulty = Scores(data, {"m": np.full(4, 0.5)}, 2.0).residual_correlations("m")
    assert np.isnan(with_mean)  # both policies have mean 0.5
    assert with_difficulty == pytest.approx(np.corrcoef([0.4, -0.4, 0.2, -0.2], [-0.2, 0.2, -0.4, 0.4])[0, 1])


def test_records_are_read_in_either_form(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"d_7": "what?"}')
    lines = ['{"dataset": "d", "id": 7, "model": "m", "step": 3, "score": 0.5}', '{"prompt": "x", "score": 1}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    found = read_scored(tmp_path / "r.jsonl", tmp_path / "prompts.json", -1, 1)
    assert [(row.prompt, row.policy, row.step) for row in found] == [("what?", "m step 3", 3), ("x", "", 0)]
    assert list(by_policy(found)) == ["m step 3", ""]
    doubled = to_record([Scored("x", 1.0), Scored("y", 0.0), Scored("x", 0.5)])
    assert (doubled.prompts, doubled.outcomes.tolist()) == (["x", "y"], [0.75, 0.0])
    with pytest.raises(BadLine, match=r"r.jsonl:1: prompt of d_7 is unknown: --prompts is not given"):
        read_scored(tmp_path / "r.jsonl", None, -1, 1)
    (tmp_path / "prompts.json").write_text('{"d_7": "what?"}', encoding="utf-8-sig")
    assert read_scored(tmp_path / "r.jsonl", tmp_path / "prompts.json", -1, 1) == found
    (tmp_path / "prompts.json").write_text("[]")
    with pytest.raises(InputError, match="holds a list; allowed: a JSON object"):
        read_scored(tmp_path / "r.jsonl", tmp_path / "prompts.json", -1, 1)


@pytest.mark.parametrize(
    ("step", "shown"), [("NaN", "nan"), ("Infinity", "inf"), ('"3"', '"3"'), ("true", "true"), ("null", None)]
)
def test_the_step_of_a_policy_is_a_number(tmp_path: Path, step: str, shown: str | None) -> None:
    (tmp_path / "r.jsonl").write_text(f'{{"prompt": "x", "model": "m", "step": {step}, "score": 0.5}}\n')
    if shown is None:
        assert read_scored(tmp_path / "r.jsonl", None, -1, 1)[0].step == 0
        return
    with pytest.raises(BadLine, match=f"r.jsonl:1: step is {shown}; allowed"):
        read_scored(tmp_path / "r.jsonl", None, -1, 1)


def test_the_published_records_from_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    """A part of the records, which is too little to beat anything by much; the tables and files are complete."""
    folder, output, plot = v0_folder(), tmp_path / "study.json", tmp_path / "plot.png"
    arguments = ["study", "prior", "--records", folder / "context.jsonl", "--prompts", folder / "prompts.json"]
    options = ["--limit", 90, "--folds", 3, "--resamples", 20, "--cache", tmp_path / "cache", "--output", output]
    monkeypatch.setattr(sys, "argv", ["v05", *map(str, [*arguments, *options, "--plot", plot, "--no-alone"])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert "embedded V0" in capsys.readouterr().out
    report = json.loads(output.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report["policies"] == ["Qwen3-4B-Instruct step 16"]
    for name in ("context mean", "ridge, embedder", "the same, pooled", EMBEDDED):
        entry = report["models"][name]
        low, high = entry["squared_error_interval"]
        assert low < entry["squared_error"] < high
    assert report["models"]["context mean"]["auc"] == 0.5
    assert plot.read_bytes()[:4] == b"\x89PNG"
    torch.set_num_threads(2)
