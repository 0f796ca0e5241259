"""Advantage estimators by name: each is a baseline and a scale. The numbers are those of csrc/formulas.h."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Baseline(IntEnum):
    """What is subtracted from a reward."""

    FUSED = 0  # V0.5: prior and group mean, fused
    FUSED_LOO = 1  # the same, without the rollout's own reward
    GROUP = 2  # mean of the group
    LOO = 3  # mean of the rest of the group
    BATCH = 4  # mean of the batch


class Scale(IntEnum):
    """What a centred reward is divided by."""

    NONE = 0
    GROUP = 1  # std of the group's rewards
    BATCH = 2  # std of the batch's rewards
    BASELINE = 3  # std that the baseline implies


class Estimator(NamedTuple):
    """A baseline, and the scale that belongs to the estimator's definition."""

    baseline: Baseline
    scale: Scale = Scale.NONE

    @property
    def needs_prior(self) -> bool:
        """Whether the baseline is fused with a prior."""
        return self.baseline in (Baseline.FUSED, Baseline.FUSED_LOO)


ESTIMATORS = {
    "v05": Estimator(Baseline.FUSED),  # arXiv 2603.10848
    "v05_loo": Estimator(Baseline.FUSED_LOO),  # ours
    "grpo": Estimator(Baseline.GROUP, Scale.GROUP),  # arXiv 2402.03300
    "dr_grpo": Estimator(Baseline.GROUP),  # arXiv 2503.20783
    "rloo": Estimator(Baseline.LOO),  # arXiv 2402.14740
    "reinforce_plus_plus": Estimator(Baseline.BATCH, Scale.BATCH),  # arXiv 2501.03262
}
SCALES = {scale.name.lower(): scale for scale in Scale}


def resolve(estimator: str, scale: str) -> Estimator:
    """The baseline and scale of an estimator's name and a scale's name.

    Raises:
        ValueError: an unknown name, or a scale that contradicts the estimator's own.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}; allowed: {', '.join(map(repr, ESTIMATORS))}")
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed: {', '.join(map(repr, SCALES))}")
    defined, asked = ESTIMATORS[estimator], SCALES[scale]
    if defined.scale is Scale.NONE:
        return Estimator(defined.baseline, asked)
    if asked not in (Scale.NONE, defined.scale):
        own = defined.scale.name.lower()
        raise ValueError(f"scale is {scale!r} but {estimator} is defined with {own!r}; allowed: 'none' or {own!r}")
    return defined
