"""`v05 train` with vLLM as its sampler: the weights that learn are the weights that sample, streaming or in batches."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.with_vllm import tiny_qwen3
from v05.cli import app
from v05.training.metrics import read_metrics

pytestmark = pytest.mark.vllm
OPTIONS = {"enforce_eager": True, "block_size": 32, "max_num_seqs": 8}


def count_threes(prompt: str, completion: str, record: dict[str, str]) -> float:
    """A reward that any answer can have and none has always."""
    return float(completion.count("3") > 0)


@pytest.mark.parametrize(("engine", "mode"), [("vllm", "stream"), ("vllm-sync", "batch")])
def test_a_run_learns_from_what_vllm_samples(tmp_path: Path, engine: str, mode: str) -> None:
    model = tiny_qwen3.write(tmp_path / "model", 0)
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{n}+{m}=", "answer": ""}) + "\n" for n in range(6) for m in range(5))
    )
    arguments = ["--model", model, "--data", data, "--verifier", f"{__file__}:count_threes", "--engine", engine]
    arguments += ["--engine-options", json.dumps(OPTIONS), "--mode", mode, "--window", 2, "--dtype", "float32"]
    arguments += ["--max-new-tokens", 12, "--rollouts", 96, "--rollouts-per-update", 24, "--prior", "history"]
    arguments += ["--learning-rate", "1e-3", "--output", tmp_path / "run"]
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"heldout_prompts": 2, "eval_every": 48, "model": {"max_prompt_tokens": 64}}))
    result = CliRunner().invoke(app, ["train", "--config", str(config), *map(str, arguments)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    lines = read_metrics(tmp_path / "run")[1:]
    assert lines[-1]["rollouts"] >= 96
    assert all(line["reward_failures"] == 0 for line in lines)
    fresh = [line for line in lines if line.get("stalest", 0) == 0]
    assert fresh
    assert all(line["sampler_gap"] < 1e-4 for line in fresh)  # vLLM has the trainer's weights
    if mode == "stream":
        stale = [line for line in lines if line["stalest"] > 0]
        assert stale
        assert all(line["stalest"] <= 1 for line in stale)
        assert max(line["sampler_gap"] for line in stale) > 1e-4  # and had earlier ones before
        assert not any(line["requests_failed"] or line["requests_garbage"] for line in lines)
