"""What `+algorithm.v05.*` says in verl's configuration."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Protocol

from v05.integrations.reward_range import parsed_range
from v05.kernels.advantage.estimators import ESTIMATORS, resolve
from v05.kernels.shrinkage.op import FUSIONS
from v05.kernels.shrinkage.rules import make_budget

OTHERS = "others"
PREFIX = "v05"


def prefixed(name: str) -> str:
    """Return the name in verl of what has this name here."""
    return name if name.startswith(PREFIX) else f"{PREFIX}_{name}"


NAMES = {prefixed(name): name for name in ESTIMATORS}


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
            that has `predict(uids)`. verl draws uids anew in every step, so that class has to be told what they stand
            for, as `v05.integrations.verl.memory.Recalled` is by the managers of `v05.integrations.verl.rollouts`.
        scale: what advantages are divided by; see `group_advantage`.
        k_init, k_max, cost: of the look-ahead in `LookAheadManager`; see `shrinkage`. `PriorManager` keeps groups at
            `rollout.n`.
        fusion: of the look-ahead, `"v05"` or `"calibrated"`; where it is not given, that of `algorithm.adv_estimator`.
        memory: full name of what makes those managers' prior from the reward range: an object with `predict(prompts)`,
            the prompts' texts; `observe`, `state_dict` and `load_state_dict` are used where it has them.
    """

    reward_range: tuple[float, float] = (0.0, 1.0)
    prior: str = OTHERS
    scale: str = "none"
    k_init: int = 4
    k_max: int = 16
    cost: float = 1 / 256
    fusion: str = "v05"
    memory: str = "v05.integrations.verl.memory.history"

    def __post_init__(self) -> None:
        """Check every setting by itself; whether names lead anywhere is the matter of `find_names`.

        Raises:
            ValueError: one that is not allowed.
        """
        for name, kind, allowed in (
            ("k_init", Integral, "a whole number"),
            ("k_max", Integral, "a whole number"),
            ("cost", Real, "a number"),
            ("prior", str, "a full name"),
            ("memory", str, "a full name"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"algorithm.v05.{name} is {value!r}; allowed: {allowed}")
        if self.fusion not in FUSIONS:
            raise ValueError(f"algorithm.v05.fusion is {self.fusion!r}; allowed: {', '.join(FUSIONS)}")
        try:
            make_budget(self.reward_range, self.cost, self.k_init, self.k_max)
            resolve("v05", self.scale)
        except ValueError as error:
            raise ValueError(f"algorithm.v05: {error}") from error

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Return the settings in verl's `algorithm` section, a mapping or None.

        Raises:
            ValueError: an unknown key, or a setting that is not allowed, or not with `adv_estimator`.
        """
        section = None if config is None else config.get("v05", None)
        given = {} if section is None else dict(section)
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"algorithm.v05 has {', '.join(unknown)}; allowed: {', '.join(known)}")
        ends = parsed_range("algorithm.v05.reward_range", given.pop("reward_range", cls.reward_range))
        estimator = "" if config is None else str(config.get("adv_estimator", ""))
        own = ESTIMATORS[NAMES[estimator]].fusion if estimator in NAMES else None
        fusion = given.pop("fusion", own or cls.fusion)
        settings = cls(reward_range=ends, fusion=fusion, **given)
        if estimator in NAMES:
            try:
                resolve(NAMES[estimator], settings.scale)
            except ValueError as error:
                raise ValueError(f"algorithm.v05: {error}") from error
        return settings

    def find_names(self) -> None:
        """Look up what `prior` and `memory` name, so that a job with a wrong one ends before it has begun.

        Raises:
            ValueError: there is no such thing, or it is not what it has to be.
        """
        if not callable(load("memory", self.memory)):
            raise ValueError(f"algorithm.v05.memory is {self.memory!r}, which cannot be called")
        if self.prior != OTHERS:
            load_prior(self.prior)


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
