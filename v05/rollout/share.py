"""Dividing what is left of a budget that does not cover all wishes."""

from collections.abc import Sequence


def share_out(wanted: Sequence[int], gains: Sequence[float], budget: int) -> list[int]:
    """Return how many rollouts each group gets when `budget` may not cover what all of them want.

    Args:
        wanted: rollouts that each group wants, 0 or more, [G].
        gains: what the next rollout is worth to each group, [G]; the largest is served first, ties in order.
        budget: rollouts there are, 0 or more.

    Returns:
        [G] numbers, each at most what is wanted, adding up to `min(sum(wanted), budget)`.
    """
    given = [0] * len(wanted)
    for group in sorted(range(len(wanted)), key=lambda group: -gains[group]):
        given[group] = min(wanted[group], budget)
        budget -= given[group]
    return given
