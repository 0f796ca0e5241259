"""The engines of `v05 train` and `v05 evaluate` by name, sampling from the weights and the tokens of a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from v05.errors import InputError
from v05.policy import Policy
from v05.rollout import make
from v05.rollout.engine import Engine
from v05.rollout.hf import TransformersEngine
from v05.rollout.queued import QueuedEngine

ENGINES: Final = make.KINDS
ADDRESSES: Final = ("http://", "https://")


def check_engine(name: str) -> None:
    """Raise InputError unless `name` is one of `ENGINES` or a server's address."""
    if name not in ENGINES and not name.startswith(ADDRESSES):
        raise InputError(f"engine is {name!r}; allowed: {', '.join(ENGINES)}, or a server's address http://host:port")


class PolicyCodec:
    """Prompts and answers as the policy itself reads and writes them, for an engine of its own."""

    def __init__(self, policy: Policy) -> None:
        """Use the tokenizer of `policy`, with its chat template where it has one."""
        self.policy = policy

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Return the prompt's token ids."""
        return tuple(self.policy.encode([prompt])[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, leaving out special tokens."""
        return self.policy.decode(ids)


def make_engine(
    name: str,
    policy: Policy,
    sequences_at_once: int | None = None,
    *,
    model: str = "",
    dtype: str = "auto",
    longest: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Engine:
    """Return an engine that samples from `policy`; later weights arrive through `update_weights`.

    Args:
        name: one of `ENGINES`, or a server's address; all but `hf`, transformers in this process, also stream.
        policy: model and tokenizer.
        sequences_at_once: answers in one batch of `hf` at most; None for no limit.
        model: folder or name that the other engines load.
        dtype: of their weights.
        longest: prompt and answer together, in tokens; None for the model's own limit.
        options: more arguments of theirs, see `v05.rollout.make`.

    Raises:
        InputError: no engine has that name, or an option is not allowed.
    """
    check_engine(name)
    if name == "hf":
        return TransformersEngine(policy, sequences_at_once)
    engine: Any = make.make_engine(name, model, dtype=dtype, max_model_len=longest, options=options)
    engine.codec = PolicyCodec(policy)
    return cast(Engine, engine)


def streaming(engine: Engine) -> Engine:
    """Return an engine that streams as well: itself, or its batches behind a queue."""
    return engine if hasattr(engine, "submit") else QueuedEngine(engine)


def close_engine(engine: Engine) -> None:
    """Stop an engine that has something to stop."""
    close = getattr(engine, "close", None)
    if close is not None:
        close()
