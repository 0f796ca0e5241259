"""What the commands share: which V0 is asked for, and where embeddings are kept."""

from __future__ import annotations

import math
from pathlib import Path

from v05.errors import InputError
from v05.value.cache import DEFAULT_LIMIT, default_folder
from v05.value.embedder import QWEN
from v05.value.model import V0, Record

GIB = 2**30


def cache_file(cache: Path | None) -> Path:
    """Return the file of embeddings: the one given, or the user's own."""
    return cache or default_folder() / "embeddings.sqlite"


def cache_limit(cache_gib: float) -> int:
    """Return the bytes of embeddings that are kept at most."""
    if not 0 < cache_gib < math.inf:
        raise InputError(f"--cache-gib is {cache_gib:g}; allowed: above 0 and finite")
    return math.ceil(cache_gib * GIB)


def make_model(
    checkpoint: Path | None,
    head: Path | None,
    backbone: str | None,
    device: str,
    cache: Path | None,
    cache_gib: float = DEFAULT_LIMIT / GIB,
    background: list[Record] | None = None,
    reward_range: tuple[float, float] = (-1.0, 1.0),
) -> V0:
    """Return the published V0 where its checkpoint is given, the embedded one otherwise.

    Raises:
        InputError: a head, a backbone or a device without a checkpoint, or what the model itself raises.
    """
    file, limit = cache_file(cache), cache_limit(cache_gib)
    if checkpoint is None:
        if backbone is not None or head is not None:
            raise InputError("--backbone or --head is given without --checkpoint; allowed: with it")
        if device != "cpu":
            raise InputError(f"--device is {device} without --checkpoint; allowed: cpu, where the embedded V0 runs")
        return V0.embedded(background or [], reward_range=reward_range, cache=file, cache_limit=limit)
    if background:
        raise InputError("--background is for the embedded V0; allowed: without --checkpoint")
    return V0.from_pretrained(checkpoint, head, backbone=backbone or QWEN, device=device, cache=file, cache_limit=limit)
