"""The policies that the embedded tasks start from: small, of the Qwen3 architecture, with a token per character."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from v05.errors import InputError
from v05.policy import Policy


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
