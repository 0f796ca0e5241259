"""The algorithms by name: each a few choices around the same loop."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from v05.batch import Groups
from v05.errors import InputError
from v05.kernels import group_advantage
from v05.kernels.advantage.estimators import ESTIMATORS
from v05.kernels.shrinkage.rules import LARGEST


@dataclass(frozen=True)
class Algorithm:
    """What distinguishes one algorithm from another.

    Attributes:
        name: as asked for, with k and learning rate where they were given.
        k_init: rollouts that every prompt starts with.
        k_max: rollouts that a prompt may grow to; `k_init` for groups of fixed size.
        estimator: an estimator of `group_advantage`, or `prior` for reward minus prior.
        prior: whether a prior is used: the configured one, one running mean for all prompts, or none.
        aggregation: how tokens are weighed, see `v05.packing.token_weights`.
        clip_low: lower bound of the ratio is `1 - clip_low`.
        clip_high: upper bound of the ratio is `1 + clip_high`.
        drop_equal: whether groups with all rewards equal are dropped and replaced.
        learning_rate: overrides the configured one; None to keep it.
        cost: price of a rollout in the look-ahead; None to keep the configured one.
    """

    name: str
    k_init: int
    k_max: int
    estimator: str
    prior: Literal["configured", "running_mean", "none"]
    aggregation: str = "seq-mean-token-sum-norm"
    clip_low: float = 0.2
    clip_high: float = 0.2
    drop_equal: bool = False
    learning_rate: float | None = None
    cost: float | None = None

    @property
    def fusion(self) -> Literal["v05", "calibrated"]:
        """Return how prior and rollouts are fused in the look-ahead: as in the baseline, where that is fused."""
        return (ESTIMATORS[self.estimator].fusion if self.estimator in ESTIMATORS else None) or "v05"

    @property
    def grows(self) -> bool:
        """Return whether groups may get more than their first rollouts."""
        return self.k_max > self.k_init

    def cost_or(self, configured: float) -> float:
        """Return the price of a rollout in the look-ahead: its own, or the configured one where it has none."""
        return configured if self.cost is None else self.cost

    def advantages(
        self,
        groups: Groups,
        prior: Tensor | None,
        reward_range: tuple[float, float],
        mixture: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the advantage of every rollout.

        Args:
            groups: G groups with N rollouts in all.
            prior: expected rewards [G] float32; needed unless `self.prior` is `none`.
            reward_range: smallest and largest reward.
            mixture: state of calibrated fusion from the last update; None at the first.
            lengths: tokens of every rollout [N]; needed by `opo`.

        Returns:
            [N] float32.

        Raises:
            InputError: a prior is needed and missing.
        """
        if self.prior != "none" and prior is None:
            raise InputError(f"prior is None; allowed for {self.name}: a tensor of {len(groups.counts)} rewards")
        if self.estimator == "prior" and prior is not None:
            return groups.rewards - prior[groups.group_of_rollout]
        return group_advantage(
            groups.rewards,
            groups.offsets,
            estimator=self.estimator,
            prior=prior if ESTIMATORS[self.estimator].needs_prior else None,
            reward_range=reward_range,
            state=mixture,
            lengths=lengths,
        )


ALGORITHMS: Final[Mapping[str, Algorithm]] = MappingProxyType(
    {
        "v05": Algorithm("v05", 4, 16, "v05", "configured"),
        "v05_loo": Algorithm("v05_loo", 4, 16, "v05_loo", "configured"),
        "v05_calibrated": Algorithm("v05_calibrated", 4, 16, "v05_calibrated", "configured"),
        "v05_calibrated_loo": Algorithm("v05_calibrated_loo", 4, 16, "v05_calibrated_loo", "configured"),
        # A price at which growth is rare: rollouts are then left for more prompts.
        "v05_from_one": Algorithm("v05_from_one", 1, 16, "v05_calibrated_loo", "configured", cost=1 / 64),
        "opo": Algorithm("opo", 16, 16, "opo", "none"),
        "james_stein": Algorithm("james_stein", 16, 16, "james_stein", "none"),
        "grpo": Algorithm("grpo", 16, 16, "grpo", "none", "seq-mean-token-mean"),
        "dr_grpo": Algorithm("dr_grpo", 16, 16, "dr_grpo", "none"),
        "rloo": Algorithm("rloo", 16, 16, "rloo", "none"),
        "dapo": Algorithm("dapo", 16, 16, "grpo", "none", "token-mean", clip_high=0.28, drop_equal=True),
        "spo": Algorithm("spo", 1, 1, "prior", "configured"),
        "reinforce": Algorithm("reinforce", 1, 1, "prior", "running_mean"),
    }
)
SMALLEST_GROUP: Final[Mapping[str, int]] = MappingProxyType({"grpo": 2, "dr_grpo": 2, "rloo": 2, "dapo": 2, "opo": 2})


def parse_algorithm(text: str) -> Algorithm:
    """Return the algorithm that `name[:k[-k_max]][@learning_rate]` describes.

    Args:
        text: for example `v05`, `v05:1` (start with one rollout, still grow to 16), `v05:4-4` (never grow), `grpo:16`,
            `dr_grpo:4@1e-4`.

    Returns:
        The algorithm, its name being `text`.

    Raises:
        InputError: unknown name, or a k or learning rate that is not allowed.
    """
    head, at, rate = text.strip().partition("@")
    name, colon, size = head.partition(":")
    if name not in ALGORITHMS:
        raise InputError(
            f"algorithm is {text!r}; allowed: name[:k[-k_max]][@learning_rate], name one of {', '.join(ALGORITHMS)}"
        )
    algorithm = dataclasses.replace(ALGORITHMS[name], name=text.strip())
    if colon:
        k_init, k_max = _sizes(size, algorithm, SMALLEST_GROUP.get(name, 1), text)
        algorithm = dataclasses.replace(algorithm, k_init=k_init, k_max=k_max)
    if at:
        algorithm = dataclasses.replace(algorithm, learning_rate=_learning_rate(rate, text))
    return algorithm


def _sizes(size: str, algorithm: Algorithm, smallest: int, text: str) -> tuple[int, int]:
    """Return the first and the largest size of a group; only an algorithm that grows takes two numbers."""
    first, dash, last = size.partition("-")
    if not algorithm.grows:
        if not size.isdecimal() or int(size) < smallest:
            raise InputError(f"k is {size!r} in {text!r}; allowed: {smallest} or more")
        return int(size), int(size)
    largest = last if dash else str(algorithm.k_max)
    if not (first.isdecimal() and largest.isdecimal() and smallest <= int(first) <= int(largest)):
        limit = "k-k_max, 1 <= k <= k_max" if dash else f"{smallest} to {algorithm.k_max}, or k-k_max"
        raise InputError(f"k is {size!r} in {text!r}; allowed: {limit}")
    if int(largest) > LARGEST:
        raise InputError(f"k is {size!r} in {text!r}; allowed: a k_max of {LARGEST} or less")
    return int(first), int(largest)


def equal_groups(groups: Groups) -> Tensor:
    """Return which groups have only equal rewards, [G] bool; true for empty groups and groups of one."""
    lowest = torch.full((len(groups.counts),), torch.inf)
    highest = -lowest
    lowest.scatter_reduce_(0, groups.group_of_rollout, groups.rewards, "amin")
    highest.scatter_reduce_(0, groups.group_of_rollout, groups.rewards, "amax")
    return ~(highest > lowest)


def _learning_rate(rate: str, text: str) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise InputError(f"learning rate is {rate!r} in {text!r}; allowed: a number above 0")
    return value
