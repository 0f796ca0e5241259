"""The range of rewards, as the hosts' configurations give it and as estimators take it."""

from __future__ import annotations

from torch import Tensor


def widened(reward_range: tuple[float, float], rewards: Tensor) -> tuple[float, float]:
    """Return the range that holds all `rewards` [N] too: what estimators without a prior compute with."""
    if not len(rewards):
        return reward_range
    smallest, largest = (float(end) for end in rewards.aminmax())
    return min(reward_range[0], smallest), max(reward_range[1], largest)
