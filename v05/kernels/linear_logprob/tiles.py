"""Sizes of the tiles of the kernels that make logits by architecture and operand, without a search at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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
# Of the kernels of `triton_hopper`, measured on an H200 beside 40 others: as fast as cuBLAS's products alone.
HOPPER = {"sm_90": Tile(128, 256, 64, 8, 3, 2, 4), "interpreter": INTERPRETED}


def architecture_of(device: torch.device) -> str:
    """The key of `TILES` for a GPU: its own family, or sm_80, whose tiles fit into 99 KiB; "interpreter" for a CPU.

    Raises:
        RuntimeError: the GPU is older than any of them.
    """
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"linear_logprob in Triton needs compute capability 8.0; this GPU has {major}.{minor}")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile_of(architecture: str, size: int, aligned: bool, has_bias: bool) -> Tile:
    """The tile of the kernels that run everywhere, for operands of `size` bytes."""
    if architecture == "interpreter":
        return INTERPRETED
    key = architecture, size, aligned
    return WITH_BIAS.get(key, TILES[key]) if has_bias else TILES[key]


def hopper_tile_of(*matrices: Tensor) -> Tile | None:
    """The tile of the kernels of `triton_hopper`; None where the GPU's copy engine cannot take one of the matrices.

    Here it takes those of 2 bytes an element whose rows begin at multiples of 16 bytes.
    """
    for matrix in matrices:
        numbers = (matrix.shape[1], matrix.stride(0), matrix.data_ptr() // 2)
        apart = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
        if matrix.element_size() != 2 or not apart or any(number % 8 for number in numbers):
            return None
    return HOPPER.get(architecture_of(matrices[0].device))


def tile_for(hidden: Tensor, weight: Tensor, has_bias: bool) -> Tile:
    """The tile of the other kernels, for operands whose rows have no gaps."""
    numbers = (hidden.shape[1], hidden.stride(0), weight.stride(0), hidden.data_ptr(), weight.data_ptr())
    aligned = all(number % 16 == 0 for number in numbers)
    return tile_of(architecture_of(hidden.device), weight.element_size(), aligned, has_bias)
