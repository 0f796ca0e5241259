"""Language models of random weights, made at test time: small, and with all that a real one has."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from v05.value.embedder import TokenStates, TransformersEmbedder

LETTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz.,?$\\"


def make_tokenizer(words: Sequence[str], *, spaced: bool = False, unknown: str = "<pad>", **options: Any) -> Any:
    """Return a tokenizer of transformers whose ids are places in `words`, which are letters unless they are `spaced`.

    `options` are transformers' own; without them `<pad>` fills up and `<eos>` ends.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    if spaced:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"pad_token": "<pad>", "eos_token": "<eos>", **options})


def qwen3_config(vocabulary: int, width: int, *, heads: int = 2, **settings: Any) -> Any:
    """Return the configuration of a Qwen3 of two layers; `settings` are transformers' own."""
    from transformers import Qwen3Config

    sizes: dict[str, Any] = dict(hidden_size=width, intermediate_size=2 * width, head_dim=width // 2)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads // 2)
    return Qwen3Config(vocab_size=vocabulary, **{**sizes, **settings})


def write_qwen3(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """Write a causal Qwen3 of two layers with a tokenizer of one token a letter, and return its folder."""
    from transformers import Qwen3Model

    letters = ["<pad>", "<eos>", *LETTERS]
    make_tokenizer(letters).save_pretrained(folder)
    torch.manual_seed(seed)
    Qwen3Model(qwen3_config(len(letters), width, head_dim=16, max_position_embeddings=256)).save_pretrained(folder)
    return folder


def tiny_embedder(folder: Path, **settings: int) -> TransformersEmbedder:
    """Return an embedder of `write_qwen3`'s model."""
    return TransformersEmbedder.from_pretrained(write_qwen3(folder), **settings)


class LettersEmbedder:
    """Two parts of a state, each a fixed random vector a letter, averaged: a stand-in for a sentence model's speed."""

    name, width = "letters", 32

    def __init__(self) -> None:
        self.table = torch.randn(256, self.width, generator=torch.Generator().manual_seed(0))
        self.asked: list[str] = []

    def embed(self, prompts: list[str]) -> TokenStates:
        """Return one vector a prompt."""
        self.asked += prompts
        if not prompts:
            return TokenStates(torch.zeros(0, self.width), torch.zeros(1, dtype=torch.int64))
        rows = torch.stack([self.table[list(prompt.encode() or b" ")].mean(0) for prompt in prompts])
        states = torch.nn.functional.normalize(rows.unflatten(1, (2, -1)), dim=-1).flatten(1)
        return TokenStates(states, torch.arange(len(prompts) + 1))
