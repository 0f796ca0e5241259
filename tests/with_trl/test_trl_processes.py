"""Two processes and accumulation steps against one process and one step: the same weights, growing groups included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_trl import write_policy

pytestmark = pytest.mark.trl
SCRIPT = Path(__file__).with_name("two_processes.py")
VARIANTS = [
    dict(loss_type="dapo", beta=0.05),
    dict(loss_type="grpo", estimator="v05_calibrated_loo"),
    dict(loss_type="dr_grpo", loss_backend="linear_policy_loss"),
    dict(loss_type="grpo", loss_backend="trl"),
    dict(loss_type="dapo", logprob_backend="trl"),
]


def run(folder, output, launcher, rows, variants):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # as pytest has it, for `tiny_models`
    command = [*launcher, str(SCRIPT), folder, output, str(rows), json.dumps(variants)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        (load_file(f"{output}{i}.safetensors"), json.loads(Path(f"{output}{i}.json").read_text("utf-8")))
        for i in range(len(variants))
    ]


def test_two_processes_learn_what_one_does(tmp_path):
    folder = write_policy(str(tmp_path / "policy"))
    start = load_file(f"{folder}/model.safetensors")
    one = run(folder, str(tmp_path / "one"), [sys.executable], 8, VARIANTS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    split = [dict(options, gradient_accumulation_steps=2) for options in VARIANTS]
    two = run(folder, str(tmp_path / "two"), launcher, 2, split)
    for options, (whole, log), (parts, split_log) in zip(VARIANTS, one, two, strict=True):
        assert max(entry.get("v05/rollouts_per_prompt", 0) for entry in log) > 4, options
        for name in ("v05/rollouts_per_prompt", "v05/conflicts", "reward", "completions/mean_length", "loss"):
            values, others = ([entry[name] for entry in each if name in entry] for each in (log, split_log))
            assert values == pytest.approx(others, rel=1e-4, abs=1e-6), (options, name)
        moved = max(float((value - start[name]).abs().max()) for name, value in whole.items())
        assert moved > 1e-2
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5, msg=f"{options} {name}")
