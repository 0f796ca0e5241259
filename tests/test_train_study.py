"""`v05 study train`: the sweep, the runs, the table, and a study that goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from v05.cli import app
from v05.errors import InputError
from v05.stop import StopRequest
from v05.studies.table import StudyTable
from v05.studies.training import TUNING_SEED, TrainStudy, best_rates, carry_out, final_runs, tuning_runs
from v05.studies.training_report import Trained, table_of, verdicts
from v05.training.compare import Curve
from v05.training.config import TrainConfig
from v05.training.run import Interrupted, read_metrics

SMALL = ("--rates", "1e-4,4e-4", "--tuning-seeds", 1, "--rollouts", 64, "--per-update", 16, "--heldout", 8)
TINY = ("--policy", "tiny", "--warm-start-steps", 2)


def run(folder: Path, *more: object) -> str:
    result = CliRunner().invoke(app, ["study", "train", "--output", str(folder), *map(str, (*SMALL, *TINY, *more))])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def trained(name: str, rows: list[list[float]], rate: float = 1e-4) -> Trained:
    accuracy = np.array(rows)
    budgets = tuple(range(0, 100 * accuracy.shape[1], 100))
    return Trained(Curve(name, budgets, accuracy), np.tile(np.array(budgets) / 50, (len(rows), 1)), rate, 4.0)


def test_a_study_tunes_runs_and_goes_on(tmp_path: Path) -> None:
    run(tmp_path, "--algorithms", "grpo:4,reinforce", "--seeds", 1)
    first = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/*/summary.json")}
    assert sum(file.parts[-3] == "tuning" for file in first) == 4
    assert sum(file.parts[-3] == "runs" for file in first) == 2
    output = run(tmp_path, "--algorithms", "grpo:4,reinforce,v05:1", "--seeds", 2, "--workers", 2)
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 6
    assert len(list(tmp_path.glob("tuning/*/summary.json"))) == 6
    table = StudyTable.read(tmp_path / "table.json")
    assert [row[0] for row in table.rows] == ["grpo:4", "reinforce", "v05:1"]
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert table.command.startswith("v05 study train --output runs/arithmetic --task arithmetic")
    assert table.command.endswith("--heldout 8 --policy tiny --warm-start-steps 2")
    assert "interquartile mean of 2 seeds" in " ".join(output.split())
    assert (tmp_path / "training.png").stat().st_size > 1000
    for folder in tmp_path.glob("runs/*"):
        times = read_metrics(folder, "times.jsonl")
        assert [line["rollouts"] for line in times] == [
            line["rollouts"] for line in read_metrics(folder) if "heldout_right" in line
        ]
        assert times[0]["seconds"] == 0 < times[1]["seconds"] < times[-1]["seconds"]
    with pytest.raises(InputError, match="a study with other settings"):
        run(tmp_path, "--algorithms", "grpo:4,reinforce", "--heldout", 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_is_obeyed_and_nothing_is_lost(tmp_path: Path, workers: int) -> None:
    small = dict(policy="tiny", warm_start_steps=2, rollouts=64, rollouts_per_update=16, eval_every=16)
    config = TrainConfig(prior="history", heldout_prompts=4, heldout_samples=1, **small)  # type: ignore[arg-type]
    study = TrainStudy(("grpo:4", "reinforce", "spo"), rates=(1e-4,), tuning_seeds=1, config=config)
    stop, calls = StopRequest(), list[int]()

    def ask(done: int, total: int) -> None:
        calls.append(done)
        stop.requested = done >= 1

    with pytest.raises(Interrupted, match="saved in"):
        carry_out(tuning_runs(study), tmp_path, workers, stop, ask)
    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("tuning/*/summary.json")}
    assert 1 <= len(finished) < 3
    carry_out(tuning_runs(study), tmp_path, 1, StopRequest(), lambda done, total: calls.append(done))
    assert calls[-1] == 3
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert len(list(tmp_path.glob("tuning/*/summary.json"))) == 3


def test_the_sweep_shares_nothing_with_the_study() -> None:
    study = TrainStudy(("v05", "spo"), rates=(1e-4, 2e-4), tuning_seeds=2, seeds=3)
    tuning, final = tuning_runs(study), final_runs(study, {"v05": 1e-4, "spo": 2e-4})
    assert (len(tuning), len(final)) == (8, 6)
    assert {run.config.seed for run in tuning} == {TUNING_SEED, TUNING_SEED + 1}
    assert {run.config.seed for run in final} == {0, 1, 2}
    assert {run.config.heldout_seed for run in tuning} == {TUNING_SEED}
    assert {run.config.heldout_seed for run in final} == {study.config.heldout_seed}
    assert {run.config.learning_rate for run in final if run.config.algorithm == "spo"} == {2e-4}
    assert len({run.folder for run in (*tuning, *final)}) == 14
    assert best_rates({"v05": {1e-4: 0.5, 2e-4: 0.6}, "spo": {1e-4: 0.3, 2e-4: 0.2}}) == {"v05": 2e-4, "spo": 1e-4}


def test_the_verdict_by_hand() -> None:
    reference = trained("grpo:16", [[0.1, 0.2, 0.3, 0.4, 0.5]] * 4)
    faster = trained("spo", [[0.1, 0.5, 0.6, 0.7, 0.8], [0.1, 0.4, 0.6, 0.7, 0.8]] * 2)
    never = trained("dapo:16", [[0.1, 0.1, 0.1, 0.1, 0.2]] * 4)
    found = {verdict.name: verdict for verdict in verdicts([faster, reference, never])}
    assert found["spo"].within_quarter == 2
    assert found["spo"].ahead.value == pytest.approx(0.3)
    assert found["spo"].needed.value == pytest.approx(100 + 100 * 0.05 / 0.15)
    assert found["spo"].at[-1] == pytest.approx((0.8, 0.8, 0.8))
    assert found["spo"].seconds == 8
    assert found["grpo:16"].needed.value == 400
    assert found["grpo:16"].seconds_needed == 8
    assert found["grpo:16"].ahead == (0, 0, 0)
    assert found["dapo:16"].needed == (float("inf"),) * 3
    early = verdicts([trained("v05", [[0.5, 0.1, 0.5, 0.5, 0.5]] * 3 + [[0.0] * 5]), reference])[0]
    assert early.within_quarter == 3  # having been there is enough
    assert (early.needed.value, early.seconds_needed) == (0, 0)  # the middle half has no seed that never is
    table = table_of([faster, reference, never], "v05 study train", "accuracy")
    assert "never" in table.rows[2][8]
    assert table.rows[0][9] == "2 of 4"
    assert json.dumps(table.rows)
    assert table.markdown().count("\n| ") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithms": ("v05@1e-4",)}, "the sweep chooses it"),
        ({"algorithms": ("v05", "v05")}, "all different"),
        ({"algorithms": ("ppo",)}, "allowed: name"),
        ({"rates": (0.0,)}, "above 0"),
        ({"seeds": 0}, "1 to 100"),
    ],
)
def test_what_cannot_be_studied_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainStudy(**{"algorithms": ("v05",), **change})  # type: ignore[arg-type]
