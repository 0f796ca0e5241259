"""An engine by its name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from v05.errors import InputError
from v05.rollout.hf import TransformersEngine
from v05.rollout.vllm_async import AsyncVllm
from v05.rollout.vllm_in_process import InProcessVllm
from v05.rollout.vllm_library import VllmSettings
from v05.rollout.vllm_server import ServerEngine, ServerSettings

KINDS: Final = ("hf", "vllm", "vllm-sync")


def make_engine(
    kind: str,
    model: str | Path,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    seed: int = 0,
    chat: bool = False,
    options: Mapping[str, Any] | None = None,
) -> TransformersEngine | AsyncVllm | InProcessVllm | ServerEngine:
    """Start an engine on a model.

    Args:
        kind: `hf` (transformers, in this process, batches alone), `vllm` (continuous batching in a process of its own),
            `vllm-sync` (vLLM in this process), or the address of a vLLM server, `http://host:port`.
        model: folder or name; of a server, where its tokenizer is.
        dtype: of the weights: `auto`, `float32`, `bfloat16` or `float16`. A server has its own.
        max_model_len: longest prompt and answer together, in tokens; of the vLLM kinds.
        seed: of draws that have no seed of their own; of the vLLM kinds.
        chat: prompts are the user's message in the tokenizer's chat template; not of `hf`.
        options: more arguments of vLLM's engine, or fields of `ServerSettings` for a server; none for `hf`.

    Returns:
        The engine; all generate batches, all but `hf` also stream (see `StreamingEngine`).

    Raises:
        InputError: the kind or an option is not allowed, or a package is missing.
        EngineDied: there is no healthy server at the address.
    """
    options = dict(options or {})
    if kind.startswith(("http://", "https://")):
        allowed = {field.name for field in dataclasses.fields(ServerSettings)} - {"url", "model", "chat"}
        _check_options(kind, options, allowed)
        return ServerEngine(ServerSettings(kind, model, chat=chat, **options))
    if kind in ("vllm", "vllm-sync"):
        settings = VllmSettings(model, dtype, max_model_len, seed, chat, options)
        return AsyncVllm(settings) if kind == "vllm" else InProcessVllm(settings)
    if kind != "hf":
        raise InputError(f"engine is {kind!r}; allowed: {', '.join(KINDS)}, or a server's address http://host:port")
    _check_options(kind, options, set())
    if chat:
        raise InputError("chat with the engine 'hf' is not allowed; allowed: vllm, vllm-sync or a server")
    return _transformers(model, dtype)


def _check_options(kind: str, options: Mapping[str, Any], allowed: set[str]) -> None:
    unknown = sorted(options.keys() - allowed)
    if unknown:
        raise InputError(f"option {unknown[0]!r} of engine {kind!r}; allowed: {', '.join(sorted(allowed)) or 'none'}")


def _transformers(model: str | Path, dtype: str) -> TransformersEngine:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from v05.policy import Policy

    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype)
    return TransformersEngine(Policy(loaded, AutoTokenizer.from_pretrained(str(model))))
