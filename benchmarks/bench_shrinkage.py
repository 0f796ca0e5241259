"""shrinkage beside its equations in torch, eager and compiled. No package has a rival: none fuses a prior."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends
from benchmarks.rivals import groups_of
from benchmarks.timing import Run
from v05.kernels import shrinkage
from v05.kernels.calibration.components import COMPONENTS, STEPS

FULL, QUICK = [512, 4096, 65536], [512]


def statistics(
    rewards: Tensor, offsets: Tensor, prior: Tensor, fusion: str, backend: str | None = "reference"
) -> Sequence[Tensor]:
    """Everything but the counts that shrinkage returns."""
    s = shrinkage(rewards, offsets, prior, fusion=fusion, backend=backend)
    if s.state is None:
        return s.mean, s.deviation, s.weight, s.baseline, s.mse, s.gain, s.planned
    return s.mean, s.weight, s.baseline, s.mse, s.gain, s.state / s.state.sum()


def case(groups: int, device: torch.device, fusion: str = "v05", seed: int = 0) -> Case:
    data = groups_of(groups, device, seed)
    rewards = data.rewards

    def run(backend: str | None) -> Run:
        return lambda: statistics(*data, fusion, backend)

    size = rewards.element_size()
    fit = rewards.numel() * COMPONENTS * 4 + groups * COMPONENTS * STEPS * 3
    return Case(
        op="shrinkage" if fusion == "v05" else "calibration",
        shape=f"{groups} groups of 4 to 16",
        dtype="float32",
        direction="forward",
        bytes=rewards.numel() * size + groups * (8 + size + 6 * size + 2 * 8 + 1),
        flops=rewards.numel() * 2 + groups * 40 if fusion == "v05" else fit,
        contenders=[
            Contender(OURS, run(None)),
            Contender("torch eager", run("reference")),
            Contender("torch.compile", lambda: compiled(statistics)(*data, fusion)),
            *of_backends(run, device),
        ],
        device=device,
        elements=rewards.numel(),
        another=lambda other: case(groups, device, fusion, other),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    yield from (case(groups, device) for groups in (QUICK if quick else FULL))
