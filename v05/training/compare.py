"""Several algorithms from the same warm start and seeds, side by side: accuracy against rollouts spent."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from v05.errors import InputError
from v05.files import write_json
from v05.plots.training import plot_comparison
from v05.stop import StopRequest
from v05.training.algorithms import parse_algorithm
from v05.training.config import TrainConfig
from v05.training.metrics import accuracies, read_metrics
from v05.training.run import Reporter, train_run


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one algorithm.

    Attributes:
        name: as it was asked for.
        rollouts: rollouts spent at each of P points, the first being 0.
        accuracy: from 0 to 1, [seeds, P] float64.
    """

    name: str
    rollouts: tuple[int, ...]
    accuracy: np.ndarray

    @property
    def final(self) -> float:
        """Return the mean accuracy at the end."""
        return float(self.accuracy[:, -1].mean())

    def rollouts_to(self, target: float) -> float | None:
        """Return the rollouts after which the mean accuracy first reaches `target`, interpolated; None for never."""
        reached = first_reach(np.array(self.rollouts), self.accuracy.mean(axis=0), target)
        return reached if math.isfinite(reached) else None


def first_reach(budgets: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Return the budget at which a curve `[P]` first reaches a target, interpolated; infinity for never."""
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return math.inf
    point = int(reached[0])
    if point == 0:
        return float(budgets[0])
    share = (target - accuracy[point - 1]) / (accuracy[point] - accuracy[point - 1])
    return float(budgets[point - 1] + share * (budgets[point] - budgets[point - 1]))


def compare(
    config: TrainConfig,
    algorithms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    stop: StopRequest,
    report: Reporter,
) -> list[Curve]:
    """Run every algorithm with every seed and write `compare.json` and `curves.png`.

    A run that is finished in `folder` is not repeated; one that was stopped goes on from its checkpoint.

    Args:
        config: the settings that all runs share; `algorithm` and `seed` are replaced.
        algorithms: as `parse_algorithm` takes them.
        seeds: one or more.
        folder: of the comparison; made where missing.
        stop: looked at after every update.
        report: shows progress.

    Returns:
        One curve per algorithm, in order.

    Raises:
        InputError: an algorithm or a seed is missing, unknown or given twice.
        Interrupted: a stop was asked for; everything is saved.
    """
    names = [parse_algorithm(text).name for text in algorithms]
    for what, given in (("algorithms", names), ("seeds", list(seeds))):
        if not given or len(set(given)) != len(given):
            raise InputError(f"{what} are {given}; allowed: one or more, all different")
    runs: dict[str, list[Path]] = {name: [] for name in names}
    for seed in seeds:
        for name in names:
            run_folder = folder / "runs" / f"{name.replace(':', '-')}-seed{seed}"
            run_config = dataclasses.replace(config, algorithm=name, seed=seed)
            train_run(run_config, run_folder, folder / "warm_start", stop, report, resume=True)
            runs[name].append(run_folder)
    curves = [read_curve(name, folders, config) for name, folders in runs.items()]
    write_json(folder / "compare.json", comparison(curves, seeds, config))
    plot_comparison({curve.name: (curve.rollouts, curve.accuracy) for curve in curves}, folder / "curves.png")
    return curves


def read_curve(name: str, folders: Sequence[Path], config: TrainConfig) -> Curve:
    """Return the curve of finished runs, at whole multiples of `eval_every` and at the end.

    Runs are evaluated after the update that passes a multiple of `eval_every`; accuracies between evaluations are
    interpolated, so that all runs are read off at the same numbers of rollouts.
    """
    points = [*range(0, config.rollouts, config.eval_every), config.rollouts]
    rows = [np.interp(points, *accuracies(read_metrics(folder))) for folder in folders]
    return Curve(name, tuple(points), np.stack(rows))


def reference_of(curves: Sequence[Curve]) -> Curve:
    """Return the curve whose final accuracy is the target: `grpo:16`, or `grpo`, or else the last one."""
    by_name = {curve.name.partition("@")[0]: curve for curve in curves}
    return by_name.get("grpo:16") or by_name.get("grpo") or curves[-1]


def comparison(curves: Sequence[Curve], seeds: Sequence[int], config: TrainConfig) -> dict[str, Any]:
    """Return what compare.json holds: settings, curves, and the rollouts that each needs for the target."""
    reference = reference_of(curves)
    needed: Mapping[str, float | None] = {curve.name: curve.rollouts_to(reference.final) for curve in curves}
    return {
        "config": {name: value for name, value in config.to_dict().items() if name not in ("algorithm", "seed")},
        "seeds": list(seeds),
        "target": {"algorithm": reference.name, "accuracy": reference.final},
        "rollouts_to_target": needed,
        "rollouts": list(curves[0].rollouts),
        "accuracy": {curve.name: curve.accuracy.tolist() for curve in curves},
    }
