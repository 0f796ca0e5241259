"""What bounds every implementation of an op: copying the bytes it must move, or multiplying as often as it must."""

from __future__ import annotations

import statistics
from functools import cache

import torch

from benchmarks.timing import Run, clock_of, synchronise

SIDE = {"cuda": (8192, torch.bfloat16), "cpu": (2048, torch.float32)}


def copier(size: int, device: torch.device) -> Run:
    """A copy that reads and writes `size` bytes together."""
    source = torch.ones(max(1, size // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


@cache
def matrix_rate(device: torch.device, threads: int) -> float:
    """FLOPs a second of torch's product of two random square matrices: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: where.
        threads: of the processor; the answer is kept by it.
    """
    side, dtype = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    clock = clock_of([lambda: (torch.mm(a, b, out=out),)], device)
    times = []
    for _ in range(12):
        synchronise(device)
        times.append(clock.milliseconds())
    return 2 * side**3 / (statistics.median(times[2:]) / 1e3)
