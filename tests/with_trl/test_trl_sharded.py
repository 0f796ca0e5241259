"""A policy sharded by FSDP, of the first kind or the second, or DeepSpeed, its output layer with the rest or apart."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from tiny_trl import write_policy

pytestmark = pytest.mark.trl
SCRIPT = Path(__file__).with_name("sharded_processes.py")


def test_two_shards_have_the_gradients_of_the_whole(tmp_path):
    folder = write_policy(str(tmp_path / "policy"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launcher, str(SCRIPT), folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ops = ("linear_policy_loss", "linear_logprob")
    cases = [*product(("FSDP", "FSDP2"), ("apart", "wrapped apart", "tied"), ops)]
    cases += product(("ZeRO-1", "ZeRO-2", "ZeRO-3"), ("apart", "tied"), ops)
    assert [line for line in done.stdout.splitlines() if ", linear_" in line] == [", ".join(case) for case in cases]
