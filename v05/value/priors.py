"""The priors that know nothing but outcomes, by name."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from v05.value.history import HistoryPrior
from v05.value.past import WithPast
from v05.value.prior import Middle, Prior, RunningMean

# history: kernel regression over past prompts, and each prompt's own past; running_mean: one number for all prompts;
# middle: of the reward range, whatever comes.
PRIORS: Final[Mapping[str, Callable[[tuple[float, float]], Prior]]] = MappingProxyType(
    {
        "history": lambda reward_range: WithPast(HistoryPrior(reward_range), reward_range),
        "running_mean": RunningMean,
        "middle": Middle,
    }
)


def named_prior(name: str, reward_range: tuple[float, float]) -> Prior:
    """Return the prior of that name, one of `PRIORS`, without knowledge yet."""
    return PRIORS[name](reward_range)
