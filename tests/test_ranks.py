"""Two processes that train one policy: the gradient of one process, one set of files, and no rank left waiting."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from test_user_model import SUMS, batch_of
from test_user_runs import TINY, settings_for
from tiny_chat import write_model
from training_runs import StopAfter, silent

from v05.checkpoint import read_checkpoint
from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.stop import Interrupted, StopRequest
from v05.training.algorithms import parse_algorithm
from v05.training.learner import Learner, share
from v05.training.loss_config import LossConfig
from v05.training.pretrained import load_policy
from v05.training.ranks import ALONE, Ranks, join_ranks, leave_ranks
from v05.training.run import train_run
from v05.training.stream_config import StreamConfig
from v05.training.team import Team, deal

CASES: dict[str, dict[str, Any]] = {
    "logits": dict(kind="qwen3"),
    "linear": dict(kind="qwen3", linear=True, micro_batches=4),
    "tied": dict(kind="llama", tied=True, linear=True, micro_batches=6, gradient_checkpointing=True),
    "kl": dict(kind="qwen3", linear=True, epochs=2, micro_batches=3, loss=LossConfig(kl="k3", kl_coef=0.5)),
    "epochs": dict(kind="gpt2", tied=True, linear=True, epochs=2),
}


def join(rank: int, world: int, store: Path) -> Ranks:
    """Join a group of processes, as torchrun would have them do."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    return Ranks(rank, world)


def make_learner(folder: Path, ranks: Ranks, **options: Any) -> Learner:
    options = {"micro_batches": 1, "epochs": 1, "linear": False} | options
    checkpointing = options.pop("gradient_checkpointing", False)
    policy = load_policy(str(folder), train=True, gradient_checkpointing=checkpointing)
    return Learner(policy, parse_algorithm("dapo"), learning_rate=0.02, temperature=0.7, ranks=ranks, **options)


def learnt(folder: Path, ranks: Ranks, kind: str = "", tied: bool = False, **options: Any) -> dict[str, Any]:
    """What two updates and a state that was loaded between them come to."""
    batch, advantages = batch_of(load_policy(str(folder)))
    first = make_learner(folder, ranks, **options)
    metrics = first.learn(batch, advantages, 20)
    grads = {name: parameter.grad for name, parameter in first.policy.model.named_parameters()}
    gradient = {name: value.full_tensor() if ranks.count > 1 else value for name, value in grads.items()}
    second = make_learner(folder, ranks, **options)
    found = first.state()
    assert ranks.leads or not any(found.values()), "eight copies on one machine need not fit"
    second.load_state(copy.deepcopy(ranks.broadcast(found)))
    for learner in (first, second):
        learner.learn(batch, advantages, 21)
    states = [ranks.broadcast(learner.state()) for learner in (first, second)]
    for part in ("policy", "optimizer"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    return {"metrics": metrics, "gradient": gradient, **states[0]}


def work(rank: int, world: int, folder: Path) -> None:
    """All that takes two processes, in one start of them."""
    ranks = join(rank, world, folder / "store")
    found: dict[str, Any] = {name: learnt(folder / name, ranks, **options) for name, options in CASES.items()}
    found["team"] = sample_together(ranks, folder / "logits")
    run_together(ranks, folder)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def write_data(file: Path) -> Path:
    file.write_text("".join(json.dumps({"prompt": prompt, "answer": "two"}) + "\n" for prompt in SUMS))
    return file


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes' work, and what each of them found."""
    folder = tmp_path_factory.mktemp("together")
    for name, options in CASES.items():
        write_model(folder / name, options["kind"], tied=options.get("tied", False))
    write_data(folder / "sums.jsonl")
    multiprocessing.spawn(work, (2, folder), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(name: str, together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = together
    alone = learnt(folder / name, ALONE, **CASES[name])
    assert max(value.abs().max() for value in alone["gradient"].values()) > 1e-3
    for result in (result[name] for result in found):
        for key, value in alone["gradient"].items():
            assert (result["gradient"][key] - value).abs().max() < 1e-6, key
        assert result["metrics"].keys() == alone["metrics"].keys()
        for key, number in alone["metrics"].items():
            assert result["metrics"][key] == pytest.approx(number, rel=1e-6, abs=3e-6), key
        assert result["policy"].keys() == alone["policy"].keys()
        assert result["optimizer"].keys() == alone["optimizer"].keys()
        for key, value in alone["policy"].items():  # Adam turns rounding of a gradient near 0 into a step
            assert (result["policy"][key] - value).abs().median() < 1e-6, key


def test_every_rank_gets_as_many_micro_batches(tmp_path: Path) -> None:
    batch, _ = batch_of(load_policy(str(write_model(tmp_path))))
    for world in (1, 2, 3, 4):
        for micro_batches in (1, 2, 3, 11):
            shares = [share(batch, micro_batches, Ranks(rank, world)) for rank in range(world)]
            assert len({len(parts) for parts in shares}) == 1
            counted = [part for parts in shares for part in parts if part[2]]
            assert sorted(part[0].start for part in counted) == sorted({part[0].start for part in counted})
            assert sum(len(part[1].tokens) for part in counted) == len(batch.tokens)
            silent = [part for parts in shares for part in parts if not part[2]]
            assert not any(part[1].weights.any() for part in silent)


def test_answers_are_dealt_out_one_by_one() -> None:
    counts = [5, 0, 1, 7, 1]
    dealt = [deal(counts, Ranks(rank, 3)) for rank in range(3)]
    assert [sum(column) for column in zip(*dealt, strict=True)] == counts
    assert [sum(row) for row in dealt] == [5, 5, 4]
    assert deal(counts, ALONE) == counts


def sample_together(ranks: Ranks, model: Path) -> list[Any]:
    team = Team(TransformersEngine(load_policy(str(model))), ranks)

    def ask() -> list[Any]:
        assert ranks.leads
        request: dict[str, Any] = dict(seed=1, temperature=1.0, max_new_tokens=3)
        return [team.generate(SUMS[:3], [3, 0, 4], **request), team.generate(SUMS[:1], [1], **request)]

    found = team.lead(ask)
    with pytest.raises(ZeroDivisionError if ranks.leads else RuntimeError, match=r"division|rank 0 failed: ZeroDiv"):
        team.lead(lambda: 1 // 0)
    assert ranks.combine({"a": ranks.rank + 1.0, "b": ranks.rank + 1.0}, ("b",)) == {"a": 3.0, "b": 2.0}
    return found


def test_a_team_samples_what_its_leader_asks_for(together: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (found["team"] for found in together[1])
    assert first == second
    assert [len(row) for row in first[0]] == [3, 0, 4]
    assert [len(row) for row in first[1]] == [1]
    assert len({rollout.logprobs for row in first[0] for rollout in row}) == 7


def run_together(ranks: Ranks, folder: Path) -> None:
    model = settings_for(folder / "tied", folder / "sums.jsonl")
    options: dict[str, Any] = dict(model=model, ranks=ranks)
    whole = train_run(TINY, folder / "whole", folder, StopRequest(), silent, **options)
    stop = StopRequest()
    report = StopAfter(stop, 160) if ranks.leads else silent
    with pytest.raises(Interrupted, match="after 160 of 384"):
        train_run(TINY, folder / "part", folder, stop, report, **options)
    own = folder / ("part" if ranks.leads else "elsewhere")
    with pytest.raises(InputError, match=r"checkpoints \[5, None\] in .*; allowed: a folder that all of them share"):
        train_run(TINY, own, folder, StopRequest(), silent, resume=True, **options)
    again = train_run(TINY, folder / "part", folder, StopRequest(), silent, resume=True, **options)
    assert again["heldout_after"] == whole["heldout_after"]
    finished = train_run(TINY, own, folder, StopRequest(), silent, resume=True, **options)
    assert finished == again
    train_run(TINY, folder / "streamed", folder, StopRequest(), silent, stream=StreamConfig("stream"), **options)


def test_the_leader_samples_alone_where_rollouts_stream(together: tuple[Path, list[dict[str, Any]]]) -> None:
    lines = [json.loads(line) for line in (together[0] / "streamed" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rollouts"] >= TINY.rollouts
    assert any(line["stalest"] > 0 for line in lines[1:])
    assert not any(line["requests_garbage"] or line["requests_given_up"] for line in lines[1:])
    checkpoint = read_checkpoint(together[0] / "streamed" / "checkpoints")
    assert checkpoint is not None
    for name, value in load_policy(str(together[0] / "streamed" / "policy")).model.named_parameters():
        assert torch.equal(value, checkpoint.tensors["policy"][name])


def test_a_run_of_two_processes_goes_on_bit_for_bit(together: tuple[Path, list[dict[str, Any]]]) -> None:
    folder = together[0]
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / "part" / "metrics.jsonl").read_bytes()
    whole, part = (read_checkpoint(folder / name / "checkpoints") for name in ("whole", "part"))
    assert whole is not None
    assert part is not None
    for name, value in whole.tensors["policy"].items():
        assert torch.equal(value, part.tensors["policy"][name])
    lines = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(len(lines)))
    assert all(line["sampler_gap"] < 1e-5 for line in lines[1:])
    assert sum(line["reward"] for line in lines[-3:]) > 0.2 + sum(line["reward"] for line in lines[1:4])
    trained = load_policy(str(folder / "whole" / "policy"))
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, whole.tensors["policy"][name])


def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    data = write_data(tmp_path / "sums.jsonl")
    config = tmp_path / "run.toml"
    config.write_text('prior = "constant"\nheldout_samples = 2\n[model]\ndevice = "cpu"\n')
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "v05"]
    command = ["train", "--output", str(tmp_path / "run"), "--config", str(config), "--data", str(data)]
    command += ["--model", str(tmp_path / "model"), "--verifier", "exact", "--max-new-tokens", "4"]
    command += ["--rollouts", "32", "--rollouts-per-update", "16"]
    done = subprocess.run([*start, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rollouts spent") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["rollouts"], summary["updates"]) == (32, 2)


def test_a_process_of_its_own_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_ranks() == ALONE
    assert ALONE.broadcast(3) == 3
    assert ALONE.gather(3) == [3]
    leave_ranks()
