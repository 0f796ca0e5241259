"""The priors by name: expected rewards before any rollout."""

from typing import Final

from v05.errors import InputError
from v05.training.algorithms import parse_algorithm
from v05.training.config import TrainConfig
from v05.value.context import PolicyContext
from v05.value.embedder import sentence_folder
from v05.value.model import V0
from v05.value.past import WithPast
from v05.value.prior import Prior
from v05.value.priors import named_prior
from v05.value.v0_prior import V0Prior

NAMES: Final = {"constant": "running_mean", "none": "middle"}  # settings that are called otherwise elsewhere


def make_prior(config: TrainConfig, reward_range: tuple[float, float]) -> Prior | None:
    """Return a new prior of the kind that the algorithm and the settings ask for."""
    kind = parse_algorithm(config.algorithm).prior
    if kind == "none":
        return None
    name = NAMES.get(config.prior, config.prior) if kind == "configured" else kind
    if name == "v0":
        return WithPast(V0Prior(V0.embedded(), PolicyContext(reward_range)), reward_range)
    return named_prior(name, reward_range)


def check_prior(config: TrainConfig) -> None:
    """Raise InputError where the prior needs a package that is not installed."""
    if config.prior == "v0" and parse_algorithm(config.algorithm).prior == "configured":
        try:
            sentence_folder()
        except InputError as error:
            raise InputError(f"{error}, or choose --prior history") from None
