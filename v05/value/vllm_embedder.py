"""Prompts to token states through vLLM's pooling runner, which batches and schedules them by itself."""

from __future__ import annotations

from collections.abc import Sequence
from os import urandom
from pathlib import Path
from typing import Any

import torch

from v05.errors import InputError
from v05.fingerprint import folder_fingerprint
from v05.value.embedder import MAX_TOKENS, QWEN, TokenStates, join


class VllmEmbedder:
    """A frozen language model in vLLM; the states are those of `TransformersEmbedder`, up to rounding."""

    def __init__(
        self,
        source: str | Path = QWEN,
        max_tokens: int = MAX_TOKENS,
        dtype: str = "auto",
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        """Start an engine that serves token states alone.

        Args:
            source: folder or name of the model.
            max_tokens: longer prompts lose their end, special tokens stay.
            dtype: of the weights, as vLLM names it.
            engine_options: more arguments of `vllm.LLM`, such as `enforce_eager` or `gpu_memory_utilization`.

        Raises:
            InputError: vLLM is not installed.
        """
        try:
            from vllm import LLM
            from vllm.config import PoolerConfig
        except ImportError:
            raise InputError("this embedder needs the package vllm; install it: pip install v05[vllm]") from None
        # The tokenizer is used here, so that the engine never sees a prompt that is too long.
        self.engine = LLM(
            model=str(source),
            runner="pooling",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            dtype=dtype,
            max_model_len=max_tokens + 1,
            **(engine_options or {}),
        )
        self.tokenizer = self.engine.get_tokenizer()
        self.max_tokens = max_tokens
        config = self.engine.llm_engine.model_config
        self.width = int(config.get_hidden_size())
        options = sorted((engine_options or {}).items())
        self.name = f"vllm/{weights_of(source, (engine_options or {}).get('revision'))}/{dtype}/{max_tokens}/{options}"

    def embed(self, prompts: Sequence[str]) -> TokenStates:
        """Return the token states of each prompt, [T, D] on the CPU; see `TransformersEmbedder.embed`."""
        if not prompts:
            return join([], self.width, 0)
        encoded = self.tokenizer(list(prompts), truncation=True, max_length=self.max_tokens)
        cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        filler = [self.tokenizer.pad_token_id or 0]
        tokens = [{"prompt_token_ids": list(ids) or filler} for ids in encoded["input_ids"]]
        outputs = self.engine.encode(tokens, pooling_task="token_embed", use_tqdm=False)
        rows = [torch.as_tensor(output.outputs.data).cpu() for output in outputs]
        return join(rows, self.width, cut)


def weights_of(source: str | Path, revision: str | None = None) -> str:
    """Return a name of the weights in a folder, or of those in the local cache under a hub's name.

    Where they are not found, such as in another download folder, it is a new one each time: nothing kept is reused.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(source)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(str(source), "config.json", revision=revision)
        except ValueError:  # no name of a hub, such as a file
            cached = None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder_fingerprint(folder) or urandom(8).hex()
