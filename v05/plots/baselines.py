"""The pictures of the studies of baselines: error by prior, and variance of the gradient by what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v05.plots.style import COLOURS, colour, open_up
from v05.studies.gradient import GradientQuality
from v05.studies.records import Cell


def plot_baseline_errors(cells: Sequence[Cell], file: Path) -> None:
    """Draw a panel for each group size: mean squared error by prior, a mark for each estimator.

    Args:
        cells: of one study.
        file: the image.
    """
    from matplotlib.figure import Figure

    sizes, priors = sorted({cell.rollouts for cell in cells}), list(dict.fromkeys(cell.prior for cell in cells))
    names = list(dict.fromkeys(cell.estimator for cell in cells))
    figure = Figure(figsize=(3.9 * len(sizes) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axis, k in zip(panels, sizes, strict=True):
        for number, name in enumerate(names):
            row = {cell.prior: cell for cell in cells if (cell.rollouts, cell.estimator) == (k, name)}
            places = [priors.index(prior) + 0.12 * (number - (len(names) - 1) / 2) for prior in row]
            axis.errorbar(
                places,
                [cell.error for cell in row.values()],
                yerr=[cell.half_width for cell in row.values()],
                fmt="o",
                ms=5,
                color=colour(number),
                label=name,
            )
        axis.set_xticks(range(len(priors)), priors, rotation=40, ha="right", fontsize=8)
        axis.set_title(f"{k} rollouts", size=11)
        axis.set_ylim(bottom=0)
        open_up(axis)
    panels[0].set_ylabel("mean squared error of the baseline")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=140)


def plot_gradients(rows: Sequence[GradientQuality], file: Path) -> None:
    """Draw a panel for each prior: variance of the gradient, times rollouts, by algorithm; dark what a prompt's
    rollouts leave, light what comes on top because more rollouts of each leave room for fewer prompts.

    Args:
        rows: of one study.
        file: the image.
    """
    from matplotlib.figure import Figure

    priors = list(dict.fromkeys(row.prior for row in rows))
    most = max(sum(row.prior == prior for row in rows) for prior in priors)
    figure = Figure(figsize=(5.2 * len(priors), 1.2 + 0.3 * most), layout="constrained")
    for axis, prior in zip(figure.subplots(1, len(priors), squeeze=False)[0], priors, strict=True):
        shown = sorted((row for row in rows if row.prior == prior), key=lambda row: -row.by_rollout_in_all)
        labels = [f"{row.estimator}:{row.size}" for row in shown]
        colours = [COLOURS[3] if row.estimator.startswith("v05") else COLOURS[6] for row in shown]
        within = [row.by_rollout for row in shown]
        between = [row.by_rollout_in_all - row.by_rollout for row in shown]
        half_width = [row.variance_half_width * row.rollouts for row in shown]
        axis.barh(labels, within, xerr=half_width, color=colours, label="of a prompt's gradient")
        axis.barh(labels, between, left=within, color=colours, alpha=0.35, label="of the choice of prompts")
        axis.set_title(f"prior: {prior}", size=11)
        axis.set_xlabel("variance x rollouts per prompt")
        axis.margins(y=0.01)
        axis.tick_params(labelsize=8)
        open_up(axis)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=140)
