"""What the embedded V0 sees of a prompt: its sentence vector, its letters, and its structure; nothing is fitted."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from v05.value.cache import content_key
from v05.value.embedder import Embedder

BUCKETS: Final = 4096  # hash buckets of character n-grams
GRAMS: Final = (2, 3, 4)
PHRASES: Final = (
    "positive integer",
    "prime",
    "triangle",
    "circle",
    "probability",
    "find the maximum",
    "minimum",
    "largest",
    "smallest",
    "how many",
    "polynomial",
    "function",
    "for all",
    "remainder",
    "divided by",
    "m+n",
    "m + n",
    "relatively prime",
    "sequence",
    "real number",
    "digit",
    "expected",
    "expressed",
    "form",
    "area",
    "angle",
    "board",
    "color",
    "points",
    "game",
    "players",
    "ways",
    "number of",
    "compute",
    "determine",
    "evaluate",
    "sum",
    "average",
    "percent",
    "cost",
    "hours",
    "original answer",
    "round",
    "[asy]",
    "prove",
    "denote",
    "let",
    "suppose",
    "complex",
    "log",
    "sin",
    "permutation",
    "set",
    "subset",
    "graph",
    "table",
    "given",
    "answer",
)
MARKS: Final = ("$", "\\", ".", "\n", "=", "^", "+", "*", "/", "(", "?")
COMMANDS: Final = (
    re.compile(r"\\(?:d?frac|sqrt)"),
    re.compile(r"\\(?:leq?|geq?|lt|gt)\b|[<>]"),
    re.compile(r"\\[lc]?dots|\.\.\."),
)
MEASURES: Final = 9 + len(MARKS) + len(COMMANDS)  # numbers that come before the phrases


class Described(NamedTuple):
    """Prompts as the embedded V0 compares them.

    Attributes:
        identity: 63 bits of a hash of the text, [N] int64: equal prompts, and only they, have equal ones.
        wording: unit vectors of an early layer of a sentence embedder, [N, D] float32.
        sentence: its unit vectors, [N, D] float32.
        letters: hashed character n-grams, logarithmic counts scaled to length 1, [N, `BUCKETS`] float32.
        structure: `MEASURES` measured numbers, then which of `PHRASES` occur, [N, S] float32.
    """

    identity: Tensor
    wording: Tensor
    sentence: Tensor
    letters: Tensor
    structure: Tensor

    def rows(self, index: Tensor | slice) -> Described:
        """Return some of the prompts."""
        return Described(*(block[index] for block in self))


def describe(prompts: Sequence[str], embedder: Embedder) -> Described:
    """Return the description of each prompt; it depends on that prompt alone.

    Args:
        prompts: N texts.
        embedder: gives one state a prompt, wording and sentence side by side, as `sentence_embedder` does.

    Returns:
        Five blocks of N rows on the CPU.
    """
    wording, sentence = embedder.embed(prompts).last.float().cpu().chunk(2, dim=-1)
    rows = [letters(prompt) for prompt in prompts]
    counts = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, BUCKETS)
    width = MEASURES + len(PHRASES)
    structures = torch.tensor([structure(prompt) for prompt in prompts], dtype=torch.float32).reshape(-1, width)
    identity = torch.tensor(
        [int.from_bytes(content_key(prompt)[:8], "big") >> 1 for prompt in prompts], dtype=torch.int64
    )
    return Described(identity, wording, sentence, torch.nn.functional.normalize(counts, dim=-1), structures)


def join(parts: Sequence[Described]) -> Described:
    """Return several descriptions one after the other."""
    return Described(*(torch.cat(blocks) for blocks in zip(*parts, strict=True)))


def letters(prompt: str) -> np.ndarray:
    """Return logarithmic counts of hashed character n-grams, [`BUCKETS`] float32.

    Case, the values of digits and the kind of white space do not matter.
    """
    text = re.sub(r"\d", "9", re.sub(r"\s+", " ", prompt.lower()))
    hashes = [zlib.crc32(text[at : at + size].encode()) for size in GRAMS for at in range(len(text) - size + 1)]
    counts = np.bincount(np.array(hashes, dtype=np.int64) % BUCKETS, minlength=BUCKETS)
    return np.log1p(counts).astype(np.float32)


def structure(prompt: str) -> list[float]:
    """Return lengths, counts, sizes of numbers and which phrases occur; counts are logarithmic."""
    words, numbers = re.findall(r"[A-Za-z]+", prompt), re.findall(r"\d+", prompt)
    lower, length = prompt.lower(), max(1, len(prompt))
    measures = [
        np.log1p(len(prompt)),
        np.log1p(len(words)),
        np.log1p(len(numbers)),
        sum(map(len, words)) / len(words) if words else 0.0,
        len(set(words)) / max(1, len(words)),
        np.log1p(max(map(len, numbers), default=0)),
        np.log1p(max((int(number[:12]) for number in numbers), default=0)),
        sum(letter.isupper() for letter in prompt) / length,
        sum(letter.isdigit() for letter in prompt) / length,
    ]
    measures += [np.log1p(prompt.count(mark)) for mark in MARKS]
    measures += [np.log1p(len(command.findall(prompt))) for command in COMMANDS]
    return [float(value) for value in measures] + [float(phrase in lower) for phrase in PHRASES]
