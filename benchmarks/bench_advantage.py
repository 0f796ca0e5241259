"""group_advantage beside its equations in torch, eager and compiled, and verl's functions over the same groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import OURS, Case, Contender, compiled, of_backends, rival
from benchmarks.rivals import groups_of
from benchmarks.timing import Run
from v05.kernels import group_advantage, segments
from v05.kernels.advantage.estimators import ESTIMATORS

FULL, QUICK = [512, 4096, 65536], [512]
VERL = {"grpo": "grpo", "rloo": "rloo"}
LOOPED = 4096  # groups at most that verl's loop, which launches kernels for every rollout, goes through on a GPU


def verl_rivals(estimator: str, rewards: Tensor, offsets: Tensor) -> list[Contender]:
    """verl's loop and its vectorised form, on responses of one token, so that nothing is broadcast."""
    if estimator not in VERL:
        return [
            Contender("verl", None, f"has no {estimator}"),
            Contender("verl vectorised", None, f"has no {estimator}"),
        ]
    index = segments.segment_ids(offsets, rewards.numel()).cpu().numpy()
    column, mask = rewards[:, None], torch.ones_like(rewards)[:, None]

    def of(infix: str) -> Contender:
        def make(algos: ModuleType) -> Run:
            if not infix and rewards.is_cuda and len(offsets) > LOOPED + 1:
                raise AttributeError(f"a loop over {len(rewards)} rollouts takes too long")
            function = getattr(algos, f"compute_{VERL[estimator]}{infix}_outcome_advantage")
            return lambda: (function(column, mask, index)[0],)

        return rival("verl vectorised" if infix else "verl", "verl.trainer.ppo.core_algos", make)

    return [of(""), of("_vectorized")]


def advantages(
    rewards: Tensor, offsets: Tensor, prior: Tensor | None, estimator: str, backend: str | None = "reference"
) -> Sequence[Tensor]:
    lengths = torch.ones_like(rewards) if ESTIMATORS[estimator].needs_lengths else None
    return (group_advantage(rewards, offsets, estimator=estimator, prior=prior, lengths=lengths, backend=backend),)


def case(estimator: str, groups: int, device: torch.device, seed: int = 0) -> Case:
    rewards, offsets, prior = groups_of(groups, device, seed)
    given = prior if ESTIMATORS[estimator].needs_prior else None

    def run(backend: str | None) -> Run:
        return lambda: advantages(rewards, offsets, given, estimator, backend)

    size = rewards.element_size()
    return Case(
        op="advantage",
        shape=f"{estimator}, {groups} groups of 4 to 16",
        dtype="float32",
        direction="forward",
        bytes=rewards.numel() * 2 * size + groups * (8 + (size if given is not None else 0)),
        flops=rewards.numel() * 6 + groups * 10,
        contenders=[
            Contender(OURS, run(None)),
            Contender("torch eager", run("reference")),
            Contender("torch.compile", lambda: compiled(advantages)(rewards, offsets, given, estimator)),
            *of_backends(run, device),
            *verl_rivals(estimator, rewards, offsets),
            Contender("TRL", None, "computed inside its trainer, no function to call"),
        ],
        device=device,
        elements=rewards.numel(),
        another=lambda other: case(estimator, groups, device, other),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time."""
    for groups in QUICK if quick else FULL:
        for estimator in ("grpo",) if device.type == "cuda" and groups != FULL[-1] else ("v05", "grpo", "rloo"):
            yield case(estimator, groups, device)
