"""The simulated engine by hand, and `v05 simulate`: what it prints, writes, draws and refuses."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from v05.cli import app, main
from v05.errors import InputError
from v05.rollout.budget import Fixed, LookAhead
from v05.rollout.simulated import LogNormal, Observed, SimulatedEngine
from v05.rollout.streaming import Request
from v05.simulation import STEPS_PER_TOKEN, Contender, Simulation, contenders, run

SMALL = ("--prompts", "24", "--slots", "32", "--steps", "3")


def simulate(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_slots_and_queue_by_hand() -> None:
    engine = SimulatedEngine(2, lambda prompt: 1.0, Observed((3,)))
    engine.submit([Request(number, "p", number, 1.0, 8) for number in range(3)])
    assert engine.wait(2) == []
    assert engine.now == 2
    assert {outcome.number for outcome in engine.wait(10)} == {0, 1}
    assert engine.now == 3
    engine.update_weights({}, 4)
    (last,) = engine.wait(10)
    assert (engine.now, engine.busy) == (6, 9)
    assert last.rollout is not None
    assert last.rollout.versions == (0, 0, 0)  # begun before the new weights came
    assert last.rollout.text == "1"
    engine.submit([Request(9, "p", 0, 1.0, 2), Request(10, "p", 1, 1.0, 8), Request(11, "p", 1, 1.0, 8)])
    engine.abort([10])
    assert [outcome.number for outcome in engine.wait(10)] == [9]
    assert engine.now == 8  # at most two tokens
    assert [outcome.number for outcome in engine.wait(10)] == [11]
    assert engine.now == 9  # its slot was free at once
    assert engine.wait(5) == []


def test_time_over_ideal_and_busy_slots_by_hand() -> None:
    """Two steps of three answers on two slots: 4 4 | 4 takes 8 steps, and 6 | 2 4 takes 6 with nothing idle."""
    lengths = iter([4, 4, 4, 6, 2, 4])
    simulation = Simulation(prompts=3, slots=2, steps=2, length=lambda draw: next(lengths))
    result = run(simulation, Contender("fixed 1", "planned", Fixed(1)))
    assert result.time == (8 + 6) / 2
    assert result.over_ideal == pytest.approx(14 / ((12 + 12) / 2))
    assert result.busy == 1  # after the first step
    assert result.tokens == 3 * STEPS_PER_TOKEN  # which stand for the last of an answer too


def test_half_of_the_prompts_are_nearly_sure_either_way() -> None:
    """As Beta(1/2, 1/2) has it, whose quartiles are sin^2(pi / 8) and cos^2(pi / 8)."""
    chances = [Simulation().success(str(number)) for number in range(2000)]
    low, high = math.sin(math.pi / 8) ** 2, math.cos(math.pi / 8) ** 2
    assert sum(chance < low for chance in chances) / 2000 == pytest.approx(0.25, abs=0.03)
    assert sum(chance > high for chance in chances) / 2000 == pytest.approx(0.25, abs=0.03)


def test_an_answer_depends_on_its_seed_alone() -> None:
    found = []
    for slots in (1, 3):
        engine = SimulatedEngine(slots, lambda prompt: 0.5, LogNormal(20, 0.8, 64))
        engine.submit([Request(number, "p", 7 * number, 1.0, 64) for number in range(20)])
        texts = {}
        while len(texts) < 20:
            for outcome in engine.wait(1e9):
                assert outcome.rollout is not None
                texts[outcome.number] = (outcome.rollout.text, len(outcome.rollout.token_ids))
        found.append(texts)
    assert found[0] == found[1]
    assert {text for text, _ in found[0].values()} == {"0", "1"}


def test_lengths_are_lognormal() -> None:
    draw, length = random.Random(0), LogNormal()
    drawn = sorted(length(draw) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(2000, rel=0.03)
    assert drawn[16_827] == pytest.approx(2000 * 2.2255, rel=0.04)  # one sigma above
    assert drawn[-1] == 16_384


def test_streaming_reaches_its_ideal_and_a_barrier_does_not() -> None:
    """The published goal on a quarter of its size: 128 prompts, 256 slots, at most 6 steps in flight."""
    simulation = Simulation(prompts=128, slots=256, steps=8, window=6)
    stream = run(simulation, Contender("look-ahead", "stream", LookAhead()))
    planned = run(simulation, Contender("look-ahead", "planned", LookAhead()))
    assert stream.over_ideal <= 1.15
    assert stream.busy >= 0.9
    assert 0 < stream.stale < stream.stalest <= 5
    assert planned.over_ideal > 2
    assert planned.stalest == 0
    assert stream.error_v05 == pytest.approx(planned.error_v05)  # the same rollouts, sooner
    assert stream.error_calibrated < stream.error_v05 < stream.error_mean


def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    output = simulate(*SMALL, "--output", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert "3 steps of 24 prompts, 32 slots" in output
    assert "…" not in output  # eighty columns are enough
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["results"]) == contenders()
    assert {row["mode"] for row in found["results"]} == {"barrier", "async", "planned", "stream"}
    assert found["settings"]["length"] == "lognormal"
    rows = {(row["name"], row["mode"]): row for row in found["results"]}
    assert rows["fixed 8", "stream"]["rollouts"] == 8
    for name in ("utility", "variance", "reinforce-ada", "its positive"):
        assert rows[name, "stream"]["rollouts"] <= rows["look-ahead", "stream"]["rollouts"] + 0.1
    assert (tmp_path / "out.png").stat().st_size > 1000
    assert simulate(*SMALL, "--output", tmp_path / "again.json") == output
    assert json.loads((tmp_path / "again.json").read_text()) == found


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("5\n7\n")
    simulate(*SMALL, "--lengths", tmp_path / "lengths", "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["settings"]["length"].endswith("lengths")
    (tmp_path / "lengths").write_text("5\nlong\n")
    with pytest.raises(InputError, match=r"lengths:2 is 'long'; allowed: a length from 1 to 16,384"):
        simulate(*SMALL, "--lengths", tmp_path / "lengths")
    (tmp_path / "lengths").write_bytes(b"5\n\xff\n")
    with pytest.raises(InputError, match="lengths:2 is"):
        simulate(*SMALL, "--lengths", tmp_path / "lengths")
    with pytest.raises(InputError, match="is a folder; allowed: a file"):
        simulate(*SMALL, "--output", tmp_path)
    with pytest.raises(InputError, match=r"--plot .*nonsense: the format 'nonsense' is unknown; allowed"):
        simulate(*SMALL, "--plot", tmp_path / "out.nonsense")
    with pytest.raises(InputError, match="--slots is 0; allowed: 1 or more"):
        simulate("--slots", 0)
    with pytest.raises(InputError, match=r"--prior-sd is -1\.0; allowed: 0 or more"):
        simulate("--prior-sd", -1.0)


def test_a_file_that_cannot_be_opened_is_said_in_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["v05", "simulate", "--lengths", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"v05: {tmp_path / 'absent'}: No such file or directory\n"
