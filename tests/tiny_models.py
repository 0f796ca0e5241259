"""Language models of random weights, made at test time: small, and with all that a real one has."""

from pathlib import Path

import torch

from v05.value.embedder import TokenStates, TransformersEmbedder

LETTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz.,?$\\"


def write_qwen3(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """Write a causal Qwen3 of two layers with a tokenizer of one token a letter, and return its folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    letters = {letter: number for number, letter in enumerate(["<pad>", "<eos>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(letters),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )
    Qwen3Model(config).save_pretrained(folder)
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
