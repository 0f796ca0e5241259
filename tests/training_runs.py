"""What tests of runs share: a short run, reporters that say nothing, and when two runs are one."""

from __future__ import annotations

from pathlib import Path

import torch

from v05.checkpoint import read_checkpoint
from v05.stop import StopRequest
from v05.training.config import TrainConfig

TINY = TrainConfig(
    policy="tiny",
    prior="history",
    rollouts=192,
    rollouts_per_update=32,
    eval_every=64,
    heldout_prompts=8,
    heldout_samples=2,
    checkpoint_every=2,
    warm_start_steps=5,
)


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Report nothing."""


class StopAfter:
    """Reports nothing, and asks for a stop once `rollouts` are spent."""

    def __init__(self, stop: StopRequest, rollouts: int) -> None:
        self.stop, self.rollouts = stop, rollouts

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        if stage != "warm start" and done >= self.rollouts:
            self.stop.requested = True


def assert_same_run(first: Path, second: Path) -> None:
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    ends = [read_checkpoint(folder / "checkpoints") for folder in (first, second)]
    assert ends[0] is not None
    assert ends[1] is not None
    for name, value in ends[0].tensors["policy"].items():
        assert torch.equal(value, ends[1].tensors["policy"][name])
