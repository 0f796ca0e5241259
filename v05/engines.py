"""The engines by name: the one place where one is made."""

from typing import Final

from v05.errors import InputError
from v05.policy import Policy
from v05.rollout.engine import Engine
from v05.rollout.hf import TransformersEngine

ENGINES: Final = ("hf",)


def check_engine(name: str) -> None:
    """Raise InputError unless `name` is one of `ENGINES`."""
    if name not in ENGINES:
        raise InputError(f"engine is {name!r}; allowed: {', '.join(ENGINES)}")


def make_engine(name: str, policy: Policy, sequences_at_once: int | None = None) -> Engine:
    """Return an engine that samples from a copy of `policy`.

    Args:
        name: one of `ENGINES`: `hf`, transformers in the trainer's process.
        policy: model and tokenizer; later weights arrive through `update_weights`.
        sequences_at_once: answers in one batch of `hf` at most; None for no limit.

    Raises:
        InputError: no engine has that name.
    """
    check_engine(name)
    return TransformersEngine(policy, sequences_at_once)
