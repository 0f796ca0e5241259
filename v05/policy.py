"""A small policy of the Qwen3 architecture, with a tokenizer of single characters."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from v05.errors import InputError


@dataclass(frozen=True)
class PolicySize:
    """The widths of a policy; all in units, heads and layers."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int


SIZES: Final[Mapping[str, PolicySize]] = MappingProxyType(
    {
        "small": PolicySize(hidden_size=64, intermediate_size=208, layers=4, heads=4, key_value_heads=2, head_dim=16),
        "tiny": PolicySize(hidden_size=32, intermediate_size=64, layers=2, heads=2, key_value_heads=1, head_dim=16),
    }
)


@dataclass(frozen=True)
class Policy:
    """A causal language model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """Return the number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without an end token.

        Args:
            texts: non-empty strings over the tokenizer's alphabet.

        Returns:
            One list of ids per text.

        Raises:
            ValueError: a text is empty or has a character outside the alphabet.
        """
        ids: list[list[int]] = self.tokenizer(list(texts))["input_ids"] if texts else []
        for text, row in zip(texts, ids, strict=True):
            if not row or self.tokenizer.unk_token_id in row:
                raise ValueError(f"cannot encode {text!r}; allowed: one or more of {self.alphabet!r}")
        return ids

    @property
    def alphabet(self) -> str:
        """Return the characters that have a token."""
        return "".join(sorted(token for token in self.tokenizer.get_vocab() if len(token) == 1))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, leaving out special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def response_logits(self, prompts: Sequence[Sequence[int]], tokens: Tensor, sequence_offsets: Tensor) -> Tensor:
        """Return the logits that predict each response token.

        Args:
            prompts: N lists of prompt token ids, none empty.
            tokens: response token ids of all sequences, one after the other, [T] int64.
            sequence_offsets: where each response starts and ends in `tokens`, [N + 1] int64.

        Returns:
            Logits [T, vocabulary] float32, differentiable in the weights.
        """
        bounds = sequence_offsets.tolist()
        responses = [tokens[first:last] for first, last in itertools.pairwise(bounds)]
        rows = [torch.cat([torch.tensor(prompt), reply]) for prompt, reply in zip(prompts, responses, strict=True)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        logits = self.model(input_ids=padded, use_cache=False).logits
        lengths = sequence_offsets.diff()
        starts = torch.tensor([len(prompt) - 1 for prompt in prompts])
        sequence = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        column = torch.arange(len(tokens)) - sequence_offsets[sequence] + starts[sequence]
        selected: Tensor = logits[sequence, column]
        return selected.float()

    def save(self, folder: Path) -> None:
        """Write the model and the tokenizer so that transformers can load them from `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def check_size(size: str) -> None:
    """Raise InputError unless `size` is one of `SIZES`."""
    if size not in SIZES:
        raise InputError(f"policy is {size!r}; allowed: {', '.join(SIZES)}")


def make_tokenizer(alphabet: str) -> Any:
    """Return a transformers tokenizer with one token per character of `alphabet`, and pad, end and unknown tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def make_policy(alphabet: str, size: str, seed: int) -> Policy:
    """Return a policy with fresh weights.

    Args:
        alphabet: the characters that it can read and write.
        size: one of `SIZES`.
        seed: fixes the weights.

    Returns:
        The policy, float32, on the CPU.

    Raises:
        InputError: no size has that name.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    check_size(size)
    widths, tokenizer = SIZES[size], make_tokenizer(alphabet)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=widths.hidden_size,
        intermediate_size=widths.intermediate_size,
        num_hidden_layers=widths.layers,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.key_value_heads,
        head_dim=widths.head_dim,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return Policy(model.train(), tokenizer)
