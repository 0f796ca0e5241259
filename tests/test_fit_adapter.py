"""`v05 fit-adapter`: the loss by hand, training that learns and goes on bit for bit, and its command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from random_tabpfn import write_tabpfn
from tiny_models import write_qwen3

from v05.cli import main
from v05.errors import InputError
from v05.files import read_tensors
from v05.fit_adapter import FitConfig, Records, fit_adapter, measures
from v05.scored import Scored
from v05.stop import StopRequest
from v05.studies.prior import outcomes_of
from v05.value.adapter_training import draw_episode, embedded_head, episode_loss, learning_rate
from v05.value.tabpfn_head import differentiable_head

TINY = FitConfig(steps=8, context=24, pairs=6, queries=4, eval_every=4, learning_rate=1e-2)


def make_records(prompts: int = 60, seed: int = 0) -> Records:
    """Prompts whose tokens carry a sign that decides whether either of two policies solves them."""
    rng = np.random.default_rng(seed)
    solved = rng.random(prompts) < 0.5
    rows = [
        Scored(f"{number:03d}", float(np.clip((0.8 if solved[number] else -0.8) + level, -1, 1)), policy, "m", step)
        for policy, step, level in (("early", 1, -0.1), ("late", 2, 0.1))
        for number in range(prompts)
    ]
    data = outcomes_of(rows, (-1.0, 1.0), 4, 0)
    generator = torch.Generator().manual_seed(seed)
    states = []
    for text in data.prompts:
        tokens = torch.randn(int(rng.integers(2, 9)), 12, generator=generator)
        tokens[:, 0] = 2.0 if solved[int(text)] else -2.0
        states.append(tokens)
    return Records(data, states, [1, 2], "made here")


def test_the_loss_by_hand() -> None:
    solved, failed = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0])
    found = episode_loss(solved, failed, torch.tensor([0.9, 0.5]), torch.tensor([0.0, 0.2]))
    pairwise = (np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2
    odds, rates = np.array([1, 0, -1, 2.0]), np.array([0.9, 0.5, 0, 0.2])
    entropy = (np.log1p(np.exp(odds)) - rates * odds).mean()
    assert float(found) == pytest.approx(0.25 * pairwise + 0.75 * entropy, abs=1e-6)
    shifted = [episode_loss(solved + c, failed + c, torch.zeros(2), torch.zeros(2)) for c in (0.0, 5.0)]
    assert shifted[1] > shifted[0]  # the cross-entropy sees a shift, the pairs do not


def test_episodes_never_ask_what_they_tell() -> None:
    rates = [0.9, 0.5, 0.1, 0.0, 1.0, 0.4, 0.6, 0.2]
    for seed in range(20):
        episode = draw_episode(rates, 3, 5, seed)
        assert episode is not None
        assert not {*episode.context} & {*episode.solved, *episode.failed}
        assert len(episode.solved) == len(episode.failed) == 2
        assert len(episode.context) == 3
        assert all(rates[row] >= 0.5 for row in episode.solved)
        assert all(rates[row] < 0.5 for row in episode.failed)
    assert draw_episode([0.9, 0.1], 3, 5, 0) is None
    assert draw_episode([], 3, 5, 0) is None


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == 2.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.01


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    config = FitConfig(steps=60, context=24, pairs=6, queries=8, eval_every=60, learning_rate=2e-2)
    report = fit_adapter(config, make_records(), embedded_head(), tmp_path / "run", StopRequest())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 60]
    assert report == lines[-1]
    assert report["auc"] > 0.95
    assert report["gauc"] > 0.95
    assert report["squared_error"] < 0.05
    assert report["pair_accuracy"] > 0.9
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    records, whole, stopped, stop = make_records(), tmp_path / "whole", tmp_path / "stopped", StopRequest()
    fit_adapter(TINY, records, embedded_head(), whole, StopRequest())

    def ask(done: int, note: str) -> None:
        stop.requested = done >= 5

    report = fit_adapter(TINY, records, embedded_head(), stopped, stop, ask)
    assert report["step"] == 5
    fit_adapter(TINY, records, embedded_head(), stopped, StopRequest(), resume=True)
    first, second = (read_tensors(folder / "adapter.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "metrics.jsonl").read_text() == (stopped / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="--resume"):
        fit_adapter(TINY, records, embedded_head(), whole, StopRequest())
    with pytest.raises(InputError, match="steps is 9; allowed when resuming"):
        fit_adapter(FitConfig(steps=9), records, embedded_head(), whole, StopRequest(), resume=True)


def test_it_trains_through_tabpfn(tmp_path: Path) -> None:
    head = differentiable_head(write_tabpfn(tmp_path / "random.ckpt"))
    config = FitConfig(steps=1, context=12, pairs=3, queries=4, eval_every=1, learning_rate=1e-2)
    records = make_records(24)
    fit_adapter(config, records, head, tmp_path / "run", StopRequest())
    torch.manual_seed(config.seed)
    from v05.value.adapter import QueryAdapter

    fresh = QueryAdapter(12, 4).state_dict()
    trained = read_tensors(tmp_path / "run" / "adapter.safetensors")
    assert not torch.equal(trained["adapter_layer.proj_kv.weight"], fresh["proj_kv.weight"])


def test_the_command_and_what_it_writes_is_used_by_predict(tmp_path: Path, capsys, monkeypatch) -> None:
    backbone = write_qwen3(tmp_path / "qwen3")
    rows = [
        {"prompt": f"{a}+{b}=" if solved else f"{a}{b}+{b}{a}+{a}=", "score": 0.8 if solved else -0.8, "policy": policy}
        for policy in ("a", "b")
        for a in range(1, 5)
        for b in range(1, 5)
        for solved in (True, False)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache, output = tmp_path / "cache", tmp_path / "run"
    common = ["--backbone", backbone, "--cache", cache]
    commands = [
        ["fit-adapter", "--records", tmp_path / "r.jsonl", "--output", output, "--steps", 3, "--pairs", 2, *common],
        ["predict", "--context", tmp_path / "r.jsonl", "--prompts", tmp_path / "r.jsonl", *common],
    ]
    commands[0] += ["--queries", 4, "--eval-every", 2]
    commands[1] += ["--checkpoint", output / "adapter.safetensors", "--output", tmp_path / "out.jsonl"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["v05", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "AUC within a policy" in printed
    assert f"use it: v05 predict --checkpoint {output}/adapter.safetensors --backbone {backbone}" in printed
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 64
    for wrong, said in (
        (["--resume", "--reward-range", "-2", "2"], "source is"),
        (["--limit", "-3"], "Invalid value for '--limit'"),
    ):
        monkeypatch.setattr(sys, "argv", ["v05", *map(str, commands[0]), *wrong])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err

    monkeypatch.setattr("v05.cli.fit_adapter.make_embedder", lambda *_: pytest.fail("the work was begun"))
    monkeypatch.setattr(sys, "argv", ["v05", *map(str, commands[0])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "has a run already; go on with --resume" in capsys.readouterr().err


def test_what_nothing_can_be_learnt_from_is_refused(tmp_path: Path) -> None:
    rows = [Scored(str(number), 1.0) for number in range(20)]
    data = outcomes_of(rows, (-1.0, 1.0), 4, 0)
    records = Records(data, [torch.zeros(2, 12)] * 20, [0], "made here")
    with pytest.raises(InputError, match="no policy has two solved and two failed prompts"):
        fit_adapter(TINY, records, embedded_head(), tmp_path / "run", StopRequest())
    assert not (tmp_path / "run").exists()


def test_a_policy_without_pairs_does_not_hide_the_others() -> None:
    rows = [
        Scored(str(n), score, policy)
        for policy in "ab"
        for n, score in enumerate((1.0, -1.0 if policy == "a" else 1.0))
    ]
    data = outcomes_of(rows, (-1.0, 1.0), 2, 0)
    assert measures(data, data.rate, [0, 0])["pair_accuracy"] == 1.0
    alike = outcomes_of(rows[2:], (-1.0, 1.0), 2, 0)
    assert measures(alike, alike.rate, [0])["pair_accuracy"] is None


def test_settings_that_are_not_allowed() -> None:
    with pytest.raises(InputError, match="steps is 0"):
        FitConfig(steps=0)
    with pytest.raises(InputError, match="learning_rate is nan"):
        FitConfig(learning_rate=float("nan"))
