"""Rollout records to decisions: baseline, weight, conflict, error, plan and advantages for every line of a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from v05.batch import offsets_of
from v05.errors import InputError
from v05.kernels import group_advantage, shrinkage
from v05.kernels.segments import choice
from v05.kernels.shrinkage.op import FUSIONS
from v05.kernels.shrinkage.rules import make_budget
from v05.records import aside, bad_path, read_blocks, whole_output, write_line

BLOCK = 8192  # lines at once
PLOT_POINTS = 20_000
ESTIMATORS = {"v05": "v05", "calibrated": "v05_calibrated"}  # whose advantages go with each fusion


@dataclass(frozen=True)
class FuseConfig:
    """Settings of `v05 fuse`.

    Attributes:
        reward_range: the smallest and the largest reward possible.
        cost: of one rollout, in units of the largest variance of a reward.
        k_init, k_max: rollouts before the first test, and at most.
        scale: of the advantages, as `group_advantage` takes it; the batch is the whole file, which `batch` keeps in
            memory.
        skip_bad: set malformed lines aside instead of stopping.
        fusion: "v05", or "calibrated", which learns from the whole file how far priors can be trusted, and keeps it in
            memory.
    """

    reward_range: tuple[float, float] = (-1.0, 1.0)
    cost: float = 1 / 256
    k_init: int = 4
    k_max: int = 16
    scale: str = "none"
    skip_bad: bool = False
    fusion: str = "v05"

    def __post_init__(self) -> None:
        """Raise InputError where a setting is not allowed."""
        try:
            choice("fusion", self.fusion, FUSIONS)
            make_budget(self.reward_range, self.cost, self.k_init, self.k_max)
        except ValueError as error:
            raise InputError(str(error)) from None


@dataclass
class Summary:
    """What a file of records came to: sums over its groups, a sample of them for the plot, and the plans' histogram."""

    groups: int = 0
    rollouts: int = 0
    zeros: int = 0  # rollouts whose reward is 0
    ones: int = 0
    bad_lines: int = 0
    conflicts: int = 0
    undecided: int = 0  # groups that roll out more
    planned: int = 0  # rollouts planned in all
    prior_sum: float = 0.0
    mean_sum: float = 0.0  # over groups that have a rollout
    groups_with_rollouts: int = 0
    weight_sum: float = 0.0
    baseline_sum: float = 0.0
    mse_sum: float = 0.0
    plans: dict[int, int] = field(default_factory=dict)  # planned rollouts -> groups
    sample: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))  # random key, prior, mean, weight
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0), repr=False)

    @property
    def zero_or_one(self) -> bool:
        """Return whether all rewards are 0 or 1, and not all are 1, which a range from -1 has too."""
        return 0 < self.zeros == self.rollouts - self.ones

    def per_group(self, total: float) -> float:
        """Return a sum over groups as a mean; 0 where there are none."""
        return total / self.groups if self.groups else 0.0

    def add(self, decisions: Decisions) -> None:
        """Add a block of groups; the sample stays uniform over all groups seen."""
        fused, prior = decisions.fused, decisions.prior
        some = fused.count > 0
        self.groups += prior.numel()
        self.rollouts += int(fused.count.sum())
        self.zeros += int((decisions.rewards == 0).sum())
        self.ones += int((decisions.rewards == 1).sum())
        self.conflicts += int((fused.deviation > 0).sum())
        self.undecided += int(fused.roll_out_more.sum())
        self.planned += int(fused.planned.sum())
        self.prior_sum += float(prior.sum())
        self.mean_sum += float(fused.mean[some].sum())
        self.groups_with_rollouts += int(some.sum())
        self.weight_sum += float(fused.weight.sum())
        self.baseline_sum += float(fused.baseline.sum())
        self.mse_sum += float(fused.mse.sum())
        for plan, groups in zip(*np.unique(fused.planned.numpy(), return_counts=True), strict=True):
            self.plans[int(plan)] = self.plans.get(int(plan), 0) + int(groups)
        columns = [prior[some].numpy(), fused.mean[some].numpy(), fused.weight[some].numpy()]
        rows = np.column_stack([self.rng.random(int(some.sum())), *columns])
        merged = np.concatenate([self.sample, rows])
        self.sample = merged[np.argsort(merged[:, 0], kind="stable")[:PLOT_POINTS]]


class Decisions:
    """A block of records after fusion, all in float64."""

    def __init__(self, records: list[dict[str, Any]], config: FuseConfig) -> None:
        lengths = [len(record["rewards"]) for record in records]
        offsets = offsets_of(lengths)
        rewards = torch.tensor([reward for record in records for reward in record["rewards"]], dtype=torch.float64)
        self.rewards = rewards
        self.prior = torch.tensor([record["prior"] for record in records], dtype=torch.float64)
        ranges = config.reward_range
        self.fused = shrinkage(
            rewards,
            offsets,
            self.prior,
            reward_range=ranges,
            cost=config.cost,
            k_init=config.k_init,
            k_max=config.k_max,
            fusion=config.fusion,
        )
        self.advantages = group_advantage(
            rewards,
            offsets,
            estimator=ESTIMATORS[config.fusion],
            prior=self.prior,
            scale=config.scale,
            reward_range=ranges,
        )
        self.bounds = offsets.tolist()

    def write(self, records: list[dict[str, Any]], out: IO[str]) -> None:
        """Write every record with what was decided about it."""
        fused, advantages = self.fused, self.advantages.tolist()
        columns = (
            fused.baseline.tolist(),
            fused.weight.tolist(),
            (fused.deviation > 0).tolist(),
            fused.mse.tolist(),
            fused.roll_out_more.tolist(),
            fused.planned.tolist(),
        )
        names = ("baseline", "weight", "conflict", "mse", "roll_out_more", "planned")
        for g, (record, *values) in enumerate(zip(records, *columns, strict=True)):
            record.update(zip(names, values, strict=True))
            record["advantages"] = advantages[self.bounds[g] : self.bounds[g + 1]]
            write_line(record, out)


def fuse_file(
    source: str,
    output: Path | None,
    config: FuseConfig | None = None,
    on_bytes: Callable[[int], None] = lambda read: None,
) -> Summary:
    """Run a file of rollout records through `shrinkage` and `group_advantage`.

    Args:
        source: a JSON Lines file of records (see `v05.records`), or `-` for standard input.
        output: where the decisions go, one line a record; None writes to standard output once all is well.
        config: the rule and the reward range; the paper's by default.
        on_bytes: told after each block how many bytes have been read.

    Returns:
        The summary over all groups.

    Raises:
        BadLine: a malformed line, unless `config.skip_bad`; then nothing is written at all.
        InputError: a file that cannot be opened.
    """
    config = config or FuseConfig()
    summary = Summary()
    with whole_output(output) as out, aside(bad_path(source, output)) as set_aside:
        size = sys.maxsize if config.scale == "batch" or config.fusion == "calibrated" else BLOCK
        for block in read_blocks(source, *config.reward_range, skip_bad=config.skip_bad, size=size):
            if block.records:
                decisions = Decisions(block.records, config)
                decisions.write(block.records, out)
                summary.add(decisions)
            summary.bad_lines += set_aside(block)
            on_bytes(block.bytes_read)
    return summary
