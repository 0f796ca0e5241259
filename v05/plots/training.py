"""Pictures of a run and of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from v05.plots.style import COLOURS, GRID, INK, colour, open_up
from v05.studies.interquartile import interquartile_mean
from v05.training.metrics import worth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from v05.studies.training_report import Trained


def plot_run(metrics: Sequence[Mapping[str, Any]], name: str, file: Path) -> None:
    """Draw one run: held-out accuracy, conflicts, and rollouts per prompt against rollouts spent.

    Args:
        metrics: lines of metrics.jsonl.
        name: of the algorithm.
        file: PNG to write.
    """
    figure, axes = _figure(3)
    evaluated = [line for line in metrics if line.get("heldout_right") is not None]
    updates = [line for line in metrics if line["update"] > 0 and line["prompts"]]
    spent = [line["rollouts"] for line in updates]
    shares = np.array([line["heldout_right"] / line["heldout_total"] for line in evaluated])
    errors = 1.96 * np.sqrt(shares * (1 - shares) / [worth(line) for line in evaluated])
    at = [line["rollouts"] for line in evaluated]
    axes[0].fill_between(at, 100 * (shares - errors), 100 * (shares + errors), color=COLOURS[0], alpha=0.15, lw=0)
    axes[0].plot(at, 100 * shares, color=COLOURS[0], lw=2, marker="o", ms=4)
    axes[0].annotate(f"{shares[-1]:.1%}", (at[-1], 100 * shares[-1]), (0, 8), textcoords="offset points", ha="right")
    _label(axes[0], "Held-out accuracy", "% right, sampled")
    conflicts = [100 * line["conflicts"] / line["prompts"] for line in updates]
    _smooth_line(axes[1], spent, conflicts, COLOURS[1])
    _label(axes[1], "Conflicts: prior against rollouts", "% of prompts")
    _smooth_line(axes[2], spent, [line["rollouts_per_prompt"] for line in updates], COLOURS[2])
    _label(axes[2], "Rollouts per prompt", "mean")
    figure.suptitle(f"{name}: {spent[-1]:,} rollouts" if spent else name, x=0.01, ha="left", color=INK, weight="bold")
    _save(figure, file)


def plot_comparison(curves: Mapping[str, tuple[Sequence[int], np.ndarray]], file: Path) -> None:
    """Draw a comparison: mean held-out accuracy against rollouts spent, with the range over seeds.

    Args:
        curves: by algorithm, rollouts spent [P] and accuracies [seeds, P] from 0 to 1.
        file: PNG to write.
    """
    figure, axes = _figure(1)
    for index, (name, (spent, shares)) in enumerate(curves.items()):
        mean = 100 * shares.mean(axis=0)
        if len(shares) > 1:
            low, high = 100 * shares.min(axis=0), 100 * shares.max(axis=0)
            axes[0].fill_between(spent, low, high, color=colour(index), alpha=0.10, lw=0)
        width = 2.4 if index == 0 else 1.6
        axes[0].plot(spent, mean, color=colour(index), lw=width, label=name, zorder=10 - index)
    seeds = max(len(shares) for _, shares in curves.values())
    _label(axes[0], f"Held-out accuracy, mean and range of {seeds} seed{'s' * (seeds > 1)}", "% right, sampled")
    axes[0].legend(frameon=False, loc="upper left", ncols=2)
    _save(figure, file)


def plot_training(trained: "Sequence[Trained]", target: float, file: Path) -> None:
    """Draw a study of training: interquartile mean of accuracy against rollouts, and against processor seconds.

    Args:
        trained: the runs of each algorithm.
        target: accuracy of the reference at the end, from 0 to 1.
        file: PNG to write.
    """
    figure, axes = _figure(2)
    figure.set_size_inches(13.0, 5.4)
    for index, each in enumerate(trained):
        mean = 100 * interquartile_mean(each.curve.accuracy)
        dashes = "-" if index < len(COLOURS) else "--"
        style: dict[str, Any] = dict(color=colour(index), lw=1.8, ls=dashes, label=each.curve.name)
        axes[0].plot(each.curve.rollouts, mean, **style)
        axes[1].plot(each.seconds.mean(axis=0), mean, **style)
        low, high = 100 * each.curve.accuracy.min(axis=0), 100 * each.curve.accuracy.max(axis=0)
        axes[0].fill_between(each.curve.rollouts, low, high, color=colour(index), alpha=0.06, lw=0)
    for panel in axes:
        panel.axhline(100 * target, color=INK, lw=0.8, ls=":")
    _label(axes[0], f"Held-out accuracy, interquartile mean and range of {len(trained[0].seconds)} seeds", "% right")
    _label(axes[1], "the same against time", "% right")
    axes[1].set_xlabel("processor seconds of updates, one thread", color=INK)
    axes[1].xaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    _save(figure, file)


def _figure(count: int) -> "tuple[Figure, list[Axes]]":
    """Return a figure of `count` panels side by side; pyplot, which keeps every figure, is not used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count if count > 1 else 8.0, 3.6 if count > 1 else 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for panel in axes:
        panel.grid(color=GRID, lw=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, length=0)
        panel.xaxis.set_major_formatter(lambda value, position: f"{value / 1000:g}k" if value else "0")
        panel.spines["left"].set_visible(False)
        panel.spines["bottom"].set_color(GRID)
    open_up(*axes)
    return figure, axes


def _label(panel: "Axes", title: str, unit: str) -> None:
    panel.set_title(title, loc="left", fontsize=10.5, color=INK)
    panel.set_xlabel("rollouts spent", color=INK)
    panel.set_ylabel(unit, color=INK)


def _smooth_line(panel: "Axes", x: Sequence[float], y: Sequence[float], color: str) -> None:
    """Draw values faintly and their centred running mean over a tenth of them boldly."""
    panel.plot(x, y, color=color, lw=0.8, alpha=0.3)
    half = max(1, len(y) // 20)
    means = [float(np.mean(y[max(0, index - half) : index + half + 1])) for index in range(len(y))]
    panel.plot(x, means, color=color, lw=2)
    panel.set_ylim(bottom=0)


def _save(figure: "Figure", file: Path) -> None:
    figure.savefig(file, dpi=150, facecolor="white")
