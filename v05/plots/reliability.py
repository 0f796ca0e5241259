"""The picture of predictions: observed against predicted success, with what chance would leave of a difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from v05.plots.style import open_up
from v05.value.measure import Reliability


def plot_reliability(curves: Mapping[str, Reliability], title: str, file: Path) -> None:
    """Draw reliability curves to an image file.

    Args:
        curves: by name.
        title: over the picture.
        file: its ending chooses the format.

    Raises:
        ValueError: a format that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", lw=1)
    for name, curve in curves.items():
        label = f"{name} (mean gap {curve.gap:.3f})"
        axes.errorbar(curve.predicted, curve.observed, yerr=1.96 * curve.error, marker="o", ms=4, lw=1.5, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="observed success rate")
    axes.set_title(title, size=11)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    open_up(axes)
    figure.savefig(file, dpi=140)
