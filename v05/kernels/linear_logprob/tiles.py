"""Sizes of the tiles of the forward kernel by architecture and operand, without a search at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

SPLIT = 4096  # columns of the vocabulary of one program: fixed, so that a row's sums are always cut the same way


class Tile(NamedTuple):
    """Rows and columns of logits at a time, features of both operands at a time, warps, loads in flight, and pieces in
    which a tile of logits is summed up, and in which its gradient is made."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int
    pieces: int
    gradient_pieces: int


# By architecture, bytes of an operand, and whether rows of both begin at multiples of 16 elements, without which loads
# are narrow and wait. Every entry is compiled ahead of time in the tests: no spills, and the shared memory fits. A
# larger tile reads less from the cache per product; its limit are the registers for the sums beside the products.
TILES = {
    ("sm_80", 2, True): Tile(128, 128, 64, 8, 3, 1, 8),
    ("sm_90", 2, True): Tile(256, 128, 64, 8, 4, 2, 8),
    ("sm_100", 2, True): Tile(128, 256, 64, 8, 3, 4, 8),
    ("gfx942", 2, True): Tile(128, 128, 64, 8, 2, 1, 8),
    ("sm_80", 4, True): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_90", 4, True): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_100", 4, True): Tile(64, 64, 32, 8, 2, 1, 1),
    ("gfx942", 4, True): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_80", 2, False): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_90", 2, False): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_100", 2, False): Tile(64, 64, 32, 8, 2, 1, 1),
    ("gfx942", 2, False): Tile(64, 64, 32, 8, 2, 1, 1),
    ("sm_80", 4, False): Tile(64, 32, 32, 8, 2, 1, 1),
    ("sm_90", 4, False): Tile(64, 32, 32, 8, 2, 1, 1),
    ("sm_100", 4, False): Tile(64, 32, 32, 8, 2, 1, 1),
    ("gfx942", 4, False): Tile(64, 32, 32, 8, 2, 1, 1),
}
# Where a bias takes registers too.
WITH_BIAS = {("sm_90", 2, True): Tile(128, 128, 64, 8, 3, 2, 8)}
INTERPRETED = Tile(16, 64, 32, 4, 1, 2, 2)  # small, for Triton's interpreter takes a second for a million products


def architecture_of(device: torch.device) -> str:
    """The key of `TILES` for a GPU: its own family, or sm_80, whose tiles fit every later one.

    Raises:
        RuntimeError: the GPU is older than any of them.
    """
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"linear_logprob in Triton needs compute capability 8.0; this GPU has {major}.{minor}")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile_of(architecture: str, size: int, aligned: bool, has_bias: bool) -> Tile:
    """The tile for operands of `size` bytes."""
    key = architecture, size, aligned
    return WITH_BIAS.get(key, TILES[key]) if has_bias else TILES[key]
