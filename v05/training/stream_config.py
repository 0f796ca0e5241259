"""The settings of sampling: who waits for whom, and who gets how many rollouts."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from v05.checks import FROM_ONE, FROM_ZERO, check, check_each, check_one_of, check_types, known
from v05.errors import InputError
from v05.rollout.limits import MODES

RULES: Final = ("look-ahead", "fixed", "utility", "variance", "reinforce-ada")
BATCH: Final = "batch"


@dataclass(frozen=True)
class StreamConfig:
    """How an update's rollouts are sampled; all of it decides what a run computes.

    Attributes:
        mode: `batch`: whole batches, exactly `rollouts_per_update` of them an update; or one of
            `v05.rollout.limits.MODES`: then an update is a step of the scheduler with `rollouts_per_update` at most.
        rule: `look-ahead`: the algorithm's own (groups of one size where it does not grow); or, with one of the modes,
            a rival by name, see `v05.rollout.budget`, with as many rollouts an update.
        window: steps in flight at most, with the mode `stream`.
        prompts: of an update; 0: so many that the algorithm's first rollouts are two thirds of `rollouts_per_update`
            where it grows, all of them where it does not.
        seconds: that a request may take.
        attempts: at a rollout before it is given up.
        restarts: of an engine that dies, without a finished rollout in between.
    """

    mode: str = BATCH
    rule: str = "look-ahead"
    window: int = 4
    prompts: int = 0
    seconds: float = 1800.0
    attempts: int = 3
    restarts: int = 3

    def __post_init__(self) -> None:
        """Raise InputError naming the first setting that is not allowed."""
        check_types(self)
        check_one_of("mode", self.mode, (BATCH, *MODES))
        check_one_of("rule", self.rule, RULES)
        if self.mode == BATCH and self.rule != "look-ahead":
            raise InputError(f"rule is {self.rule!r} with mode {BATCH}; allowed there: look-ahead")
        check_each(self, ("window", "attempts"), FROM_ONE)
        check_each(self, ("prompts", "restarts"), FROM_ZERO)
        check("seconds", self.seconds, lambda value: value > 0, "above 0")

    @property
    def streams(self) -> bool:
        """Return whether a scheduler samples."""
        return self.mode != BATCH

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name."""
        return dataclasses.asdict(self)


def make_stream_config(settings: Mapping[str, Any], given: Mapping[str, Any], where: str) -> StreamConfig:
    """Return the settings, overridden by `given`.

    Args:
        settings: by name, as in the table `sampling` of a file.
        given: by name, as on the command line.
        where: names the file in errors.

    Raises:
        InputError: unknown key, or a value that is not allowed.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"sampling is {settings!r} in {where}; allowed: a table of settings")
    return StreamConfig(**{**known(StreamConfig, settings, where), **known(StreamConfig, given, "the given settings")})


BATCHES: Final = StreamConfig()
