"""The range of rewards, as the hosts' configurations give it and as estimators take it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def parsed_range(name: str, given: Any) -> tuple[float, float]:
    """Return a setting as the smallest and the largest reward.

    Args:
        name: of the setting, for the message.
        given: its value, whatever it is.

    Raises:
        ValueError: it is not two finite numbers, the smaller one first.
    """
    try:
        low, high = (float(end) for end in given)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"{name} is {given}; allowed: two finite numbers, the smaller one first")
    return low, high


def widened(reward_range: tuple[float, float], rewards: Tensor) -> tuple[float, float]:
    """Return the range that holds all `rewards` [N] too: what estimators without a prior compute with.

    Raises:
        ValueError: a reward is infinite.
    """
    if not len(rewards):
        return reward_range
    smallest, largest = (float(end) for end in rewards.aminmax())
    if math.inf in (-smallest, largest):
        place = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"rewards[{place}] is {float(rewards[place])}; allowed: finite numbers")
    return min(reward_range[0], smallest), max(reward_range[1], largest)
