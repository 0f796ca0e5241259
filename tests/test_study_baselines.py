"""`v05 study records` and `v05 study gradient`: tables, pictures, and studies that go on where they were stopped."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.files import write_tensors
from v05.studies import records as study_records
from v05.studies.gradient import centred_gram
from v05.studies.records import PRIORS, RecordsStudy, batches, cells


def run(*arguments):
    result = CliRunner().invoke(app, ["study", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def context(tmp_path):
    file = tmp_path / "context.jsonl"
    file.write_text("".join(json.dumps({"score": score, "id": 7}) + "\n" for score in (-1.0, -0.6, 0.2, 1.0)))
    return file


def records(context, folder, *more):
    sizes = ("--repeats", 3, "--batch", 16, "--rollouts", "1,4", "--estimators", "dr_grpo,v05_calibrated")
    return run("records", "--context", context, "--output", folder, *sizes, *more)


def test_records_writes_every_cell_and_a_picture(context, tmp_path):
    output = records(context, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert len(found) == len(PRIORS) * 2 * 2
    assert {row["prior"] for row in found} == set(PRIORS)
    assert all(row["error"] > 0 and row["half_width"] > 0 for row in found)
    assert (tmp_path / "out" / "baselines.png").stat().st_size > 1000
    assert "v05_calibrated" in output
    assert "30 % hallucinated" in output


def test_the_command_in_a_table_repeats_it(context, tmp_path):
    options = ("--recorded", 4, "--seed", 3, "--reward-range", -2, 1)
    records(context, tmp_path / "out", *options)
    command = json.loads((tmp_path / "out" / "table.json").read_text())["command"]
    words = command.replace("context.jsonl", str(context)).replace("runs/records", str(tmp_path / "again")).split()
    run(*words[2:])
    assert lines(tmp_path / "again") == lines(tmp_path / "out")


def test_a_stopped_study_goes_on_to_the_same_numbers(context, tmp_path):
    records(context, tmp_path / "whole")
    records(context, tmp_path / "stopped")
    file = tmp_path / "stopped" / "results.jsonl"
    kept = file.read_text().splitlines(keepends=True)[:5]
    file.write_text("".join(kept) + '{"prior": "sd')  # stopped in the middle of a line
    records(context, tmp_path / "stopped")
    by_key = [{(r["prior"], r["rollouts"], r["estimator"]): r for r in lines_that_parse(f)} for f in tmp_path.iterdir()]
    whole, again = (rows for rows in by_key if rows)
    assert whole == again
    with pytest.raises(InputError, match="has a study with other settings"):
        records(context, tmp_path / "whole", "--seed", 1)


def lines_that_parse(folder):
    file = folder / "results.jsonl" if folder.is_dir() else None
    rows = file.read_text().splitlines() if file else []
    return [json.loads(row) for row in rows if row.endswith("}")]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"score": 2}\n', (), r"context.jsonl:1: score is 2; allowed: -1 to 1"),
        ('{"mean": 0}\n', (), r"key 'score' is missing"),
        ("", (), r"has no record; allowed: one a line"),
        ('{"score": 1}\n', ("--estimators", "grpo"), r"estimator is 'grpo'; allowed, since it has a baseline: v05, "),
        ('{"score": 1}\n', ("--estimators", "opo"), r"estimator is 'opo'; allowed, since it has a baseline"),
        ('{"score": 1}\n', ("--rollouts", "two"), r"--rollouts is 'two'; allowed: whole numbers"),
        ('{"score": 1}\n', ("--rollouts", "0"), r"rollouts is \(0,\); allowed: numbers of 1 or more"),
        ('{"score": 1}\n', ("--reward-range", "1", "1"), r"--reward-range is 1 1"),
    ],
)
def test_what_cannot_be_studied_is_named(tmp_path, text, options, message):
    file = tmp_path / "context.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        run("records", "--context", file, "--output", tmp_path / "out", *options)


def test_the_true_value_has_no_error_and_the_rest_is_expected():
    """From scores of 1 and -1 alone, four rollouts nearly always agree with the truth."""
    study = RecordsStudy(("dr_grpo", "v05"), (4,), repeats=30, batch=64, recorded=1000)
    for cell in cells([1.0, -1.0], study, "sd 0.1", 4):
        assert cell.error < 0.01
    half = {cell.estimator: cell.error for cell in cells([0.0], study, "constant", 4)}
    assert half["dr_grpo"] == pytest.approx(0.25, rel=0.15)  # the variance of a mean of four fair signs
    assert half["v05"] < half["dr_grpo"]


def test_an_error_and_its_interval_by_hand(monkeypatch):
    """Two prompts of two rollouts, twice: their means miss the truth by 0 and 0.5, then by 1 and 0."""
    rewards = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    truths = [torch.tensor([0.0, 0.5]), torch.tensor([-1.0, 1.0])]
    monkeypatch.setattr(study_records, "batches", lambda *given: ((truth, rewards, truth) for truth in truths))
    (cell,) = cells([0.0], RecordsStudy(("dr_grpo",), (2,), repeats=2, batch=2), "sd 0.1", 2)
    first, second = 0.25 / 2, 1 / 2
    assert cell.error == pytest.approx((first + second) / 2)
    spread = (second - first) / math.sqrt(2)  # the standard deviation of two numbers
    assert cell.half_width == pytest.approx(1.96 * spread / math.sqrt(2))


def test_a_hallucinated_prior_is_sure_of_the_opposite():
    truth = torch.tensor([0.4, -0.4]).repeat(5000)
    guess = PRIORS["30 % hallucinated"](truth, torch.Generator().manual_seed(0))
    wrong = guess == -0.9 * truth.sign()
    assert wrong.double().mean() == pytest.approx(0.3, abs=0.02)
    assert (guess - truth)[~wrong].std() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize("deviation", [0.1, 0.3, 0.5, 1.0])
def test_a_noisy_prior_is_off_by_its_deviation(deviation):
    guess = PRIORS[f"sd {deviation}"](torch.zeros(10_000), torch.Generator().manual_seed(0))
    assert (guess.abs() < deviation).double().mean() == pytest.approx(0.683, abs=0.02)  # as of any normal noise
    assert guess.abs().max() <= 1


def test_truth_is_drawn_around_the_record():
    """Of ten recorded rollouts none was right: Beta(0.3, 10.3), whose mean is 0.3 of 10.6."""
    truth, rewards, _ = next(batches([-1.0], RecordsStudy(batch=20_000), "constant", 2))
    rate = (truth + 1) / 2
    assert rate.mean() == pytest.approx(0.3 / 10.6, abs=0.002)
    assert rate.std() == pytest.approx(math.sqrt(0.3 * 10.3 / 10.6**2 / 11.6), rel=0.05)
    assert (rewards > 0).double().mean() == pytest.approx(0.3 / 10.6, abs=0.003)


def test_every_prior_and_group_size_has_draws_of_its_own():
    study = RecordsStudy()
    drawn = [
        next(batches([-0.4, 0.4], study, prior, k))[0] for prior, k in (("sd 0.1", 2), ("sd 0.3", 2), ("sd 0.1", 4))
    ]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0], next(batches([-0.4, 0.4], study, "sd 0.1", 2))[0])


def test_gradient_reads_its_pool_and_goes_on(tmp_path):
    rng = torch.Generator().manual_seed(0)
    answer = torch.randint(4, (3, 50), generator=rng)
    grams = torch.stack([centred_gram(torch.randn(4, 9, generator=rng), row) for row in answer])
    rewards = (torch.rand(3, 50, generator=rng) < 0.5).double() * 2 - 1
    options = ("--prompts", 3, "--pool", 50, "--repeats", 20, "--priors", "constant", "--output", tmp_path)
    pool = {"rewards": rewards, "answer": answer, "gram": grams, "common": torch.tensor(0.25, dtype=torch.float64)}
    pool["lengths"] = answer + 1
    write_tensors(tmp_path / "pool.safetensors", pool)
    run("gradient", *options, "--estimators", "rloo")
    output = run("gradient", *options, "--estimators", "rloo,v05:2-8")
    assert [(row["estimator"], row["k_init"], row["k_max"]) for row in lines(tmp_path)] == [
        ("rloo", 4, 4),
        ("v05", 2, 8),
    ]
    assert "2 to 8" in output
    assert [row["between"] for row in lines(tmp_path)] == [0.75, 0.75]
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert float(row["with prompts"]) == pytest.approx(float(row["x rollouts"]) + 4 * 0.75, abs=0.011)
    run("gradient", *options, "--estimators", "rloo,v05:2-8", "--cost", "1/256, 1/64")
    assert [row["cost"] for row in lines(tmp_path)] == [1 / 256, 1 / 256, 1 / 64]
    assert "2 to 8 at 1/64" in (tmp_path / "table.json").read_text(encoding="utf-8")
    assert (tmp_path / "gradients.png").stat().st_size > 1000
