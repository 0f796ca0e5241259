"""What `+algorithm.v05.*` says in verl's configuration."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import Any, Protocol

from v05.integrations.reward_range import parsed_range
from v05.kernels.shrinkage.op import FUSIONS

OTHERS = "others"


class GroupPrior(Protocol):
    """Predicts expected rewards of the groups of a batch, which verl tells apart by uid.

    One that has `mixture()` and `learn(mixture)` too keeps the state of calibrated fusion from batch to batch.
    """

    def predict(self, uids: list[str]) -> Any:
        """Return the expected reward of each group, [G] inside the reward range: a tensor, an array or a list."""
        ...


@dataclass(frozen=True)
class Settings:
    """Settings of the estimators; every one has a default, so that the section may be missing.

    Attributes:
        reward_range: smallest and largest reward of a rollout; of the fused estimators.
        prior: `"others"`, the mean reward of the batch's other groups, or the full name of a class without arguments
            that has `predict(uids)`, such as `v05.integrations.verl.memory.Recalled`.
        scale: what advantages are divided by; see `group_advantage`.
        k_init, k_max, cost: of the look-ahead in `LookAheadManager`; see `shrinkage`.
        fusion: of the look-ahead, `"v05"` or `"calibrated"`; where it is not given, that of `algorithm.adv_estimator`.
        memory: full name of what makes that manager's prior from the reward range.
    """

    reward_range: tuple[float, float] = (0.0, 1.0)
    prior: str = OTHERS
    scale: str = "none"
    k_init: int = 4
    k_max: int = 16
    cost: float = 1 / 256
    fusion: str = "v05"
    memory: str = "v05.integrations.verl.memory.history"

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Return the settings in verl's `algorithm` section, a mapping or None.

        Raises:
            ValueError: an unknown key or fusion, or a reward range that is not two finite, ascending numbers.
        """
        section = None if config is None else config.get("v05", None)
        given = {} if section is None else dict(section)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"algorithm.v05 has {', '.join(unknown)}; allowed: {', '.join(known)}")
        ends = parsed_range("algorithm.v05.reward_range", given.pop("reward_range", cls.reward_range))
        estimator = "" if config is None else str(config.get("adv_estimator", ""))
        fusion = given.pop("fusion", "calibrated" if estimator.startswith("v05_calibrated") else cls.fusion)
        if fusion not in FUSIONS:
            raise ValueError(f"algorithm.v05.fusion is {fusion!r}; allowed: {', '.join(FUSIONS)}")
        return cls(reward_range=ends, fusion=fusion, **given)


def load(key: str, name: str) -> Any:
    """Return what has this full name; `key` is the setting that says so.

    Raises:
        ValueError: there is no such thing.
    """
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"algorithm.v05.{key} is {name!r} ({error}); allowed: a full name") from error


def load_prior(name: str) -> GroupPrior:
    """Return an instance of the class with this full name.

    Raises:
        ValueError: there is none, or it has no `predict`.
    """
    made = load("prior", name)()
    if not callable(getattr(made, "predict", None)):
        raise ValueError(f"algorithm.v05.prior is {name!r}, which has no predict(uids)")
    return made
