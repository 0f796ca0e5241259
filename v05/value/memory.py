"""What priors remember: entries of which the oldest are forgotten, and states as the tensors of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")


def forget_oldest(entries: dict[str, Entry], most: int) -> None:
    """Remove entries, the ones put in first, until there are `most`."""
    for key in list(entries)[: max(0, len(entries) - most)]:
        del entries[key]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with a prefix to their names."""
    return {prefix + name: value for name, value in tensors.items()}


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def pack_text(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return texts as bytes [N] uint8 and the length of each [texts] int64, as a checkpoint can hold them."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    content = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8) if any(encoded) else torch.zeros(0)
    return content.to(torch.uint8), torch.tensor([len(part) for part in encoded], dtype=torch.int64)


def unpack_text(content: Tensor, lengths: Tensor) -> list[str]:
    """Return the texts that `pack_text` was given."""
    whole, texts, start = bytes(content.numpy()), [], 0
    for length in lengths.tolist():
        texts.append(whole[start : start + length].decode("utf-8", "surrogatepass"))
        start += length
    return texts
