"""What a study of training says: accuracy by budget, what the reference's end costs, and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from v05.studies.interquartile import Interval, bootstrap, interquartile_mean
from v05.studies.table import StudyTable
from v05.training.compare import Curve, first_reach, reference_of

BUDGETS: Final = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of all rollouts


@dataclass(frozen=True)
class Trained:
    """One algorithm's final runs.

    Attributes:
        curve: held-out accuracy by rollouts, [seeds, P].
        seconds: processor time of the updates until each of these points, [seeds, P].
        learning_rate: what the sweep chose.
        rollouts_per_prompt: mean over the runs.
    """

    curve: Curve
    seconds: np.ndarray
    learning_rate: float
    rollouts_per_prompt: float


class Verdict(NamedTuple):
    """One algorithm beside the reference: accuracies as shares, rollouts and seconds with 95 % intervals.

    Attributes:
        name: of the algorithm.
        at: interquartile mean of accuracy at each of `BUDGETS`.
        ahead: interquartile mean of the accuracy at the end less the reference's.
        needed: rollouts to the reference's final interquartile mean; infinity for never.
        within_quarter: seeds that reach the reference's final accuracy of the same seed in a quarter of the rollouts.
        seconds: of updating until the end, mean.
        seconds_needed: seconds to the reference's final interquartile mean; infinity for never.
    """

    name: str
    at: tuple[Interval, ...]
    ahead: Interval
    needed: Interval
    within_quarter: int
    seconds: float
    seconds_needed: float


def verdicts(trained: Sequence[Trained]) -> list[Verdict]:
    """Return what the runs say of every algorithm; the reference is `grpo:16`, `grpo`, or the last one."""
    reference = reference_of([each.curve for each in trained])
    return [_verdict(each, reference) for each in trained]


def _verdict(trained: Trained, reference: Curve) -> Verdict:
    accuracy, rollouts = trained.curve.accuracy, np.array(trained.curve.rollouts, dtype=np.float64)
    seeds, end = len(accuracy), reference.accuracy[:, -1]

    def at(point: int) -> Interval:
        return bootstrap(seeds, lambda chosen: float(interquartile_mean(accuracy[chosen, point])))

    def needed(chosen: np.ndarray) -> float:
        return first_reach(rollouts, interquartile_mean(accuracy[chosen]), float(interquartile_mean(end[chosen])))

    points = [int(np.argmin(np.abs(rollouts - share * rollouts[-1]))) for share in BUDGETS]
    quarter = points[BUDGETS.index(1 / 4)]
    mean_seconds = trained.seconds.mean(axis=0)
    return Verdict(
        name=trained.curve.name,
        at=tuple(at(point) for point in points),
        ahead=bootstrap(seeds, lambda chosen: float(interquartile_mean((accuracy[:, -1] - end)[chosen]))),
        needed=bootstrap(seeds, needed),
        within_quarter=int((accuracy[:, : quarter + 1].max(axis=1) >= end).sum()),
        seconds=float(mean_seconds[-1]),
        seconds_needed=first_reach(mean_seconds, interquartile_mean(accuracy), float(interquartile_mean(end))),
    )


def table_of(trained: Sequence[Trained], command: str, title: str) -> StudyTable:
    """Return the table of a study."""
    found = verdicts(trained)
    rollouts = trained[0].curve.rollouts[-1]
    reference = reference_of([each.curve for each in trained]).name
    columns = ["algorithm", "rate", "per prompt", *(f"{round(share * rollouts):,}" for share in BUDGETS)]
    columns += [
        f"ahead of {reference}",
        f"rollouts to {target(trained):.1%}",
        "in a quarter",
        "seconds",
        "seconds there",
    ]
    rows = []
    for each, verdict in zip(trained, found, strict=True):
        *before, end = (Interval(*(100 * value for value in share)) for share in verdict.at)
        ahead, needed = Interval(*(100 * value for value in verdict.ahead)), verdict.needed
        rows.append(
            [
                verdict.name,
                f"{each.learning_rate:g}",
                f"{each.rollouts_per_prompt:.1f}",
                *(f"{interval.value:.1f}" for interval in before),
                f"{end.value:.1f} ({end.low:.1f} to {end.high:.1f})",
                f"{ahead.value:+.1f} ({ahead.low:+.1f} to {ahead.high:+.1f})",
                f"{whole(needed.value)} ({whole(needed.low)} to {whole(needed.high)})",
                f"{verdict.within_quarter} of {len(each.curve.accuracy)}",
                whole(verdict.seconds),
                whole(verdict.seconds_needed),
            ]
        )
    notes = [
        f"Ahead: accuracy at the end less that of {reference}, seeds paired. In a quarter: seeds that reach what "
        f"{reference} reaches with the same seed at the end, in a quarter of the rollouts. Seconds: processor time of "
        f"updates, on one thread, in all and until {target(trained):.1%}; evaluation is left out."
    ]
    return StudyTable(title, command, columns, rows, notes)


def target(trained: Sequence[Trained]) -> float:
    """Return the interquartile mean of the reference's accuracy at the end."""
    return float(interquartile_mean(reference_of([each.curve for each in trained]).accuracy[:, -1]))


def whole(value: float) -> str:
    """Return a number without decimals; `never` for infinity."""
    return f"{value:,.0f}" if math.isfinite(value) else "never"
