"""How far baselines are from the truth: rewards redrawn from recorded success rates, under priors of known quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from v05.checks import FROM_ONE, check_each
from v05.errors import InputError
from v05.kernels import group_advantage
from v05.kernels.advantage.estimators import ESTIMATORS, Scale

RANGE: Final = (-1.0, 1.0)
SMOOTHING: Final = 0.3  # a success rate x of n is drawn from Beta(x + 0.3, n - x + 0.3)
Draw = Callable[[Tensor, torch.Generator], Tensor]


def _noisy(spread: float) -> Draw:
    """Return the truth with normal noise, kept in the range."""
    return lambda truth, rng: (truth + spread * torch.randn(truth.shape, generator=rng, dtype=truth.dtype)).clamp(-1, 1)


def _hallucinated(share: float) -> Draw:
    """Return the truth with noise of 0.1, but for a share of prompts -0.9 of its sign."""

    def draw(truth: Tensor, rng: torch.Generator) -> Tensor:
        wrong = torch.rand(truth.shape, generator=rng, dtype=truth.dtype) < share
        return torch.where(wrong, -0.9 * truth.sign(), _noisy(0.1)(truth, rng))

    return draw


PRIORS: Final[dict[str, Draw]] = {
    "sd 0.1": _noisy(0.1),
    "sd 0.3": _noisy(0.3),
    "sd 0.5": _noisy(0.5),
    "sd 1.0": _noisy(1.0),
    "constant": lambda truth, rng: truth.mean().expand(truth.shape),
    "10 % hallucinated": _hallucinated(0.1),
    "30 % hallucinated": _hallucinated(0.3),
}
ALLOWED: Final = tuple(  # a baseline alone, and none by the tokens that records do not have
    name
    for name, kind in ESTIMATORS.items()
    if kind.scale is Scale.NONE and not kind.by_signal and not kind.needs_lengths
)
DEFAULT: Final = ("dr_grpo", "v05", "v05_calibrated")


@dataclass(frozen=True)
class RecordsStudy:
    """What is compared: batches of `batch` prompts drawn from the records, `repeats` times, with k rollouts each."""

    estimators: tuple[str, ...] = DEFAULT
    rollouts: tuple[int, ...] = (2, 4, 8)
    repeats: int = 200
    batch: int = 256
    recorded: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InputError for names and numbers that cannot be studied."""
        for name in self.estimators:
            if name not in ALLOWED:
                raise InputError(f"estimator is {name!r}; allowed, since it has a baseline: {', '.join(ALLOWED)}")
        check_each(self, ("repeats", "batch", "recorded"), FROM_ONE)
        if not self.rollouts or min(self.rollouts) < 1:
            raise InputError(f"rollouts is {self.rollouts}; allowed: numbers of 1 or more")


class Cell(NamedTuple):
    """Mean squared error of an estimator's baselines against the true expected rewards, with half a 95 % interval."""

    prior: str
    rollouts: int
    estimator: str
    error: float
    half_width: float


def batches(scores: Sequence[float], study: RecordsStudy, prior: str, k: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield truth `[B]`, rewards `[B k]` and prior `[B]` of every repeat, float64; the same for every estimator.

    Args:
        scores: recorded mean rewards in [-1, 1], each of `study.recorded` rollouts.
        study: sizes and seed.
        prior: a key of `PRIORS`.
        k: rollouts per prompt.
    """
    solved = ((torch.tensor(scores, dtype=torch.float64) + 1) / 2 * study.recorded).round()
    rng = torch.Generator().manual_seed(study.seed * 1_000_003 + 1009 * list(PRIORS).index(prior) + k)
    for _ in range(study.repeats):
        x = solved[torch.randint(len(solved), (study.batch,), generator=rng)]
        shape = torch.stack([x + SMOOTHING, study.recorded - x + SMOOTHING], dim=1)
        gammas = torch._standard_gamma(shape, generator=rng)
        rate = gammas[:, 0] / gammas.sum(1)
        rewards = (torch.rand(study.batch, k, generator=rng, dtype=torch.float64) < rate[:, None]).double() * 2 - 1
        truth = 2 * rate - 1
        yield truth, rewards.flatten(), PRIORS[prior](truth, rng)


def cells(scores: Sequence[float], study: RecordsStudy, prior: str, k: int) -> list[Cell]:
    """Return the error of every estimator under one prior with k rollouts per prompt."""
    offsets = torch.arange(0, study.batch * k + 1, k)
    errors: dict[str, list[float]] = {name: [] for name in study.estimators}
    for truth, rewards, guess in batches(scores, study, prior, k):
        for name in study.estimators:
            given = guess if ESTIMATORS[name].needs_prior else None
            advantages = group_advantage(rewards, offsets, estimator=name, prior=given, reward_range=RANGE)
            misses = rewards - advantages - truth.repeat_interleave(k)
            errors[name].append(float(misses.square().mean()))
    found = []
    for name, values in errors.items():
        spread = float(torch.tensor(values).std()) if len(values) > 1 else math.nan
        mean = sum(values) / len(values)
        found.append(Cell(prior, k, name, mean, 1.96 * spread / math.sqrt(len(values))))
    return found
