"""A policy sharded by FSDP, of the first kind or the second, its output layer with the rest or apart."""

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
    kinds, layers, ops = ("FSDP", "FSDP2"), ("apart", "wrapped apart", "tied"), ("linear_policy_loss", "linear_logprob")
    assert done.stdout.splitlines() == [", ".join(case) for case in product(kinds, layers, ops)]
