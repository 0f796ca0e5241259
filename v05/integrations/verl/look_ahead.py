"""How many more rollouts one prompt deserves, decided as soon as its own are finished."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import torch
from torch import Tensor

from v05.integrations.verl.settings import Settings
from v05.kernels import shrinkage

RollOut = Callable[[range], Awaitable[list[float]]]


def more(rewards: list[float], prior: float, settings: Settings, mixture: Tensor | None = None) -> int:
    """Return how many further rollouts to ask for at once, 0 to stop.

    Args:
        rewards: of the prompt's finished rollouts, in the reward range.
        prior: its expected reward before any.
        settings: reward range, cost, bounds and fusion.
        mixture: state of calibrated fusion from earlier batches; None for none.

    Source: V0.5 (arXiv 2603.10848), one-step look-ahead; asking for all of `k* - k` at once, then testing again, is
    ours.
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    found = shrinkage(
        values,
        torch.tensor([0, len(rewards)]),
        torch.tensor([prior], dtype=torch.float64),
        reward_range=settings.reward_range,
        cost=settings.cost,
        k_init=settings.k_init,
        k_max=settings.k_max,
        fusion=settings.fusion,
        state=mixture if settings.fusion == "calibrated" else None,
    )
    return int(found.planned - found.count)


async def grow(roll_out: RollOut, prior: float, settings: Settings, mixture: Tensor | None = None) -> list[float]:
    """Roll one prompt out until the look-ahead stops.

    Args:
        roll_out: is given the numbers of new rollouts and returns their rewards in that order.
        prior: the prompt's expected reward.
        settings, mixture: as for `more`.

    Returns:
        All rewards, in the order of their numbers: between `k_init` and `k_max` of them.
    """
    rewards: list[float] = []
    while wanted := more(rewards, prior, settings, mixture):
        rewards += await roll_out(range(len(rewards), len(rewards) + wanted))
    return rewards
