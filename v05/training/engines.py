"""The engines of `v05 train` and `v05 evaluate` by name, sampling from the weights and the tokens of a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from v05.errors import InputError
from v05.policy import Policy
from v05.rollout.engine import Engine
from v05.rollout.hf import TransformersEngine
from v05.rollout.queued import QueuedEngine
from v05.rollout.streaming import EngineDied
from v05.rollout.vllm_async import AsyncVllm
from v05.rollout.vllm_in_process import InProcessVllm
from v05.rollout.vllm_library import VllmSettings
from v05.rollout.vllm_server import ServerEngine, ServerSettings

ENGINES: Final = ("hf", "vllm", "vllm-sync")
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
    """Start an engine that samples from `policy`; later weights arrive through `update_weights`.

    Args:
        name: `hf` (transformers, in this process, batches alone), `vllm` (continuous batching in a process of its own),
            `vllm-sync` (vLLM in this process), or the address of a vLLM server, `http://host:port`.
        policy: model and tokenizer.
        sequences_at_once: answers in one batch of `hf` at most; None for no limit.
        model: folder or name of the same model, which the other engines load.
        dtype: of the weights that vLLM loads: `auto`, `float32`, `bfloat16` or `float16`. A server has its own.
        longest: prompt and answer together, in tokens, of vLLM in a process of ours; None for the model's own limit.
        options: more arguments of vLLM's engine, or fields of `ServerSettings` for a server; none for `hf`.

    Raises:
        InputError: no engine has that name, an option is not allowed, a package is missing, or there is no healthy
            server at the address.
    """
    check_engine(name)
    options = dict(options or {})
    if name == "hf":
        _check_options(name, options, set())
        return TransformersEngine(policy, sequences_at_once)
    engine: Any
    if name in ENGINES:
        settings = VllmSettings(model, dtype, longest, options=options)
        engine = AsyncVllm(settings) if name == "vllm" else InProcessVllm(settings)
    else:
        allowed = {field.name for field in dataclasses.fields(ServerSettings)} - {"url", "model", "chat"}
        _check_options(name, options, allowed)
        try:
            engine = ServerEngine(ServerSettings(name, model, **options))
        except EngineDied as error:
            raise InputError(f"{error}; allowed: the address of a server that runs") from error
    engine.codec = PolicyCodec(policy)
    return cast(Engine, engine)


def _check_options(name: str, options: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise InputError(f"option {unknown[0]!r} of engine {name!r}; allowed: {', '.join(sorted(allowed)) or 'none'}")


def streaming(engine: Engine) -> Engine:
    """Return an engine that streams as well: itself, or its batches behind a queue."""
    return engine if hasattr(engine, "submit") else QueuedEngine(engine)


def close_engine(engine: Engine | None) -> None:
    """Stop an engine, if there is one and it has something to stop."""
    close = getattr(engine, "close", None)
    if close is not None:
        close()
