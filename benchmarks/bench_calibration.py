"""Calibrated fusion, the fit of its mixture included, beside its equations in torch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.bench_shrinkage import FULL, QUICK, case
from benchmarks.harness import Case


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    full = FULL[1:] if device.type == "cuda" else FULL  # torch takes half a minute to compile each
    yield from (case(groups, device, "calibrated") for groups in (QUICK if quick else full))
