"""The picture of `v05 fuse`: prior against observed mean, coloured by trust, and the planned rollouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from v05.fuse import FuseConfig, Summary
from v05.plots.style import COLOURS, open_up


def plot_fusion(summary: Summary, config: FuseConfig, file: Path) -> None:
    """Draw a summary to an image file.

    Args:
        summary: of `fuse_file`; its sample of at most 20,000 groups is drawn.
        config: the settings that made it.
        file: its ending chooses the format.

    Raises:
        ValueError: a format that matplotlib does not know.
    """
    from matplotlib.figure import Figure

    low, high = config.reward_range
    span = high - low
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    bound = np.sqrt((span / 2) ** 2 / config.k_init)
    line = np.array([low, high])
    left.fill_between(line, line - bound, line + bound, color="0.92")
    left.plot(line, line, color="0.6", lw=1)
    _, prior, mean, weight = summary.sample.T
    jitter = np.random.default_rng(0).normal(0, 0.008 * span, (2, prior.size))
    size = np.clip(4000 / max(prior.size, 1), 6, 24)
    dots = left.scatter(
        prior + jitter[0], mean + jitter[1], c=weight, s=size, cmap="coolwarm", vmin=0, vmax=1, alpha=0.75, lw=0
    )
    figure.colorbar(dots, ax=left, label="trust in the rollouts, w (0: the prior)", pad=0.01)
    pad = 0.05 * span
    left.set(xlim=(low - pad, high + pad), ylim=(low - pad, high + pad), xlabel="prior V", ylabel="observed mean m")
    share = summary.conflicts / summary.groups if summary.groups else 0.0
    left.set_title(
        f"{summary.groups:,} prompts, {share:.0%} in conflict (grey: noise of {config.k_init} rollouts)", size=11
    )

    plans = sorted(summary.plans)
    right.bar(plans, [summary.plans[plan] for plan in plans], color=COLOURS[0], width=0.8)
    right.set(
        xlabel="planned rollouts, k*", ylabel="prompts", title=f"{summary.per_group(summary.planned):.2f} per prompt"
    )
    right.xaxis.get_major_locator().set_params(integer=True)
    open_up(left, right)
    figure.savefig(file, dpi=140)
