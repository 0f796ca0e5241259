"""Baselines that are made before the launch, one per rollout: calibrated fusion and James-Stein."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.shrinkage.op import Shrinkage, shrinkage


class Given(NamedTuple):
    """What `group_advantage` was given, checked and in the working dtype."""

    rewards: Tensor  # [N]
    offsets: Tensor  # [G+1]
    prior: Tensor | None  # [G]
    low: float
    high: float
    backend: str | None
    state: Tensor | None  # [7], of calibrated fusion


def _ids(given: Given) -> Tensor:
    return segments.segment_ids(given.offsets, given.rewards.numel())


def _fused(given: Given, leave_one_out: bool) -> Shrinkage:
    assert given.prior is not None
    options = dict(reward_range=(given.low, given.high), fusion="calibrated", state=given.state, backend=given.backend)
    return shrinkage(given.rewards, given.offsets, given.prior, leave_one_out=leave_one_out, **options)  # type: ignore[arg-type]


def calibrated(given: Given) -> Tensor:
    """Posterior mean of each group under the mixture fitted to the batch."""
    return _fused(given, False).baseline[_ids(given)]


def calibrated_loo(given: Given) -> Tensor:
    """The same without the rollout's own reward."""
    own = _fused(given, True).rollout_baseline
    assert own is not None
    return own


def james_stein(given: Given) -> Tensor:
    """Mean of the group's other rewards, shrunk to the mean of the other groups (arXiv 2511.03710).

    The share of the other groups is v / (v + s): v the mean of their within-group variances over k, s the variance of
    their means. Both leave the group itself out. Where a group has one rollout the other groups' mean stands alone.
    """
    if given.rewards.numel() == 0:
        return given.rewards
    origin = given.rewards[0]  # equal rewards then have a baseline without rounding
    rewards = (given.rewards - origin).double()
    ids, count = _ids(given), segments.lengths(given.offsets)
    k = count.double()

    def summed(values: Tensor) -> Tensor:
        """By group, in a fixed order, without atomics and without a look at the offsets."""
        return torch.segment_reduce(values, "sum", offsets=given.offsets, unsafe=True)

    total = summed(rewards)
    mean = total / k.clamp(min=1)
    squares = summed((rewards - mean[ids]).square())
    some, several = (count > 0).double(), (count > 1).double()
    within = several * squares / (k - 1).clamp(min=1) / k.clamp(min=1)
    others = some.sum() - some
    v = (within.sum() - within) / (several.sum() - several).clamp(min=1)
    middle = (mean.sum() - mean) / others.clamp(min=1)
    s = (mean.square().sum() - mean.square()) / others.clamp(min=1) - middle.square()
    share = torch.where(others > 0, v / torch.where(v + s > 0, v + s.clamp(min=0), 1), 0)
    rest = (total[ids] - rewards) / (k[ids] - 1).clamp(min=1)
    alone = torch.where(others[ids] > 0, middle[ids], rewards)
    shrunk = torch.where(count[ids] > 1, rest + share[ids] * (middle[ids] - rest), alone)
    return origin + shrunk.to(given.rewards.dtype)


MAKERS: dict[str, Callable[[Given], Tensor]] = {
    "calibrated": calibrated,
    "calibrated_loo": calibrated_loo,
    "james_stein": james_stein,
}
