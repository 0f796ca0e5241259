"""Checks of settings, which name the setting, what it is and what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from v05.errors import InputError

Rule = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and in words which are
FROM_ONE: Final[Rule] = (lambda value: value >= 1, "1 or more")
FROM_ZERO: Final[Rule] = (lambda value: value >= 0, "0 or more")
POSITIVE: Final[Rule] = (lambda value: 0 < value < float("inf"), "above 0 and finite")
FINITE_FROM_ZERO: Final[Rule] = (lambda value: 0 <= value < float("inf"), "0 or more, and finite")


def check(name: str, value: Any, allowed: Callable[[Any], bool], description: str) -> None:
    """Raise InputError unless a setting's value is allowed."""
    if not allowed(value):
        raise InputError(f"{name} is {value!r}; allowed: {description}")


def check_each(settings: Any, names: Iterable[str], rule: Rule) -> None:
    """Raise InputError naming the first of these attributes of `settings` that breaks a rule."""
    for name in names:
        check(name, getattr(settings, name), *rule)


def check_one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise InputError unless a setting's value is one of those allowed."""
    check(name, value, lambda value: value in allowed, ", ".join(allowed))


def check_types(settings: Any) -> None:
    """Raise InputError naming the first field that is not of its default's type; a whole number is a float too."""
    for field in dataclasses.fields(settings):
        value, expected = getattr(settings, field.name), type(field.default)
        accepted = (int, float) if expected is float else (expected,)
        if (isinstance(value, bool) and expected is not bool) or not isinstance(value, accepted):
            raise InputError(f"{field.name} is {value!r}; allowed: {expected.__name__}")


def known(kind: type[Any], settings: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the settings, or raise InputError naming the first that the dataclass `kind` does not have."""
    names = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in names:
            raise InputError(f"unknown key {key!r} in {where}; allowed: {', '.join(names)}")
    return settings
