"""A warning when the sampler's log-probabilities leave the trainer's."""

import logging
from collections.abc import Mapping
from typing import Any, Final

LIMIT: Final = 0.05  # nats a token in the mean: the ratio of a sequence of 100 tokens may be off by e^5

logger = logging.getLogger(__name__)


class GapWatch:
    """Warns once the mean gap is above the limit, and again whenever it has doubled since."""

    def __init__(self, limit: float = LIMIT) -> None:
        """Warn above `limit`, in nats a token."""
        self.limit = limit

    def see(self, metrics: Mapping[str, Any]) -> str:
        """Look at an update's metrics; return the warning that was logged, or an empty string."""
        gap = metrics.get("sampler_gap_mean")
        if gap is None or gap <= self.limit:
            return ""
        message = (
            f"update {metrics['update']}: sampler and trainer differ by {gap:.3g} nats a token in the mean "
            f"(largest {metrics['sampler_gap']:.3g}; warned above {self.limit:.3g}): what is learnt from is not what "
            "the policy does. Causes are stale weights, another precision, or settings of sampling that the "
            "log-probabilities do not know."
        )
        self.limit = 2 * gap
        logger.warning(message)
        return message
