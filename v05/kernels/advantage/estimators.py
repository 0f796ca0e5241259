"""Advantage estimators by name: each is a baseline and a scale. The numbers are those of csrc/formulas.h."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple


class Baseline(IntEnum):
    """What is subtracted from a reward."""

    FUSED = 0  # V0.5: prior and group mean, fused
    FUSED_LOO = 1  # the same, without the rollout's own reward
    GROUP = 2  # mean of the group
    LOO = 3  # mean of the rest of the group
    BATCH = 4  # mean of the batch
    GIVEN = 5  # one per rollout, made before the launch: see baselines.py
    BY_LENGTH = 6  # mean of the group, each rollout weighted by its length


class Scale(IntEnum):
    """What a centred reward is divided by."""

    NONE = 0
    GROUP = 1  # std of the group's rewards
    BATCH = 2  # std of the batch's rewards
    BASELINE = 3  # std that the baseline implies


class Estimator(NamedTuple):
    """A baseline, the scale that belongs to the estimator's definition, and what else it does.

    `made` names the maker of a given baseline, `fusion` how a prior is fused. `by_signal` multiplies advantages by N
    over the rewards that are not 0.
    """

    baseline: Baseline
    scale: Scale = Scale.NONE
    made: str = ""
    fusion: Literal["v05", "calibrated"] | None = None
    by_signal: bool = False

    @property
    def needs_prior(self) -> bool:
        """Whether the baseline is fused with a prior."""
        return self.fusion is not None

    @property
    def needs_lengths(self) -> bool:
        """Whether the baseline weighs rollouts by their tokens."""
        return self.baseline is Baseline.BY_LENGTH

    @property
    def by_length(self) -> bool:
        """Whether rollouts count by their tokens where lengths are given."""
        return self.baseline in (Baseline.BY_LENGTH, Baseline.BATCH)


ESTIMATORS = {
    "v05": Estimator(Baseline.FUSED, fusion="v05"),  # arXiv 2603.10848
    "v05_loo": Estimator(Baseline.FUSED_LOO, fusion="v05"),  # ours
    "v05_calibrated": Estimator(Baseline.GIVEN, made="calibrated", fusion="calibrated"),  # ours
    "v05_calibrated_loo": Estimator(Baseline.GIVEN, made="calibrated_loo", fusion="calibrated"),  # ours
    "grpo": Estimator(Baseline.GROUP, Scale.GROUP),  # arXiv 2402.03300
    "dr_grpo": Estimator(Baseline.GROUP),  # arXiv 2503.20783
    "rloo": Estimator(Baseline.LOO),  # arXiv 2402.14740
    "reinforce_plus_plus": Estimator(Baseline.BATCH, Scale.BATCH),  # arXiv 2501.03262
    "opo": Estimator(Baseline.BY_LENGTH),  # arXiv 2505.23585
    "gpg": Estimator(Baseline.GROUP, by_signal=True),  # arXiv 2504.02546
    "james_stein": Estimator(Baseline.GIVEN, made="james_stein"),  # arXiv 2511.03710
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
        return defined._replace(scale=asked)
    if asked not in (Scale.NONE, defined.scale):
        own = defined.scale.name.lower()
        raise ValueError(f"scale is {scale!r} but {estimator} is defined with {own!r}; allowed: 'none' or {own!r}")
    return defined
