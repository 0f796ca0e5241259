"""The picture of a simulation: time against its ideal, and error against tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v05.plots.style import COLOURS, INK, open_up
from v05.simulation import Result


def plot_simulation(results: Sequence[Result], file: Path) -> None:
    """Draw time over ideal of every contender, and the error of V0.5's baseline against the tokens it took.

    Args:
        results: of one simulation.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    names = [f"{result.name}, {result.mode}" for result in results]
    kinds = list(dict.fromkeys(result.mode for result in results))
    colours = [COLOURS[kinds.index(result.mode)] for result in results]
    left.barh(range(len(results)), [result.over_ideal for result in results], color=colours, height=0.7)
    for row, result in enumerate(results):
        left.annotate(
            f"{result.over_ideal:.2f}", (result.over_ideal, row), (4, 0), textcoords="offset points", va="center"
        )
    left.set_yticks(range(len(results)), names)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    left.minorticks_off()
    left.axvline(1, color=INK, lw=0.8, ls=":")
    left.set_xlim(0.9, 1.8 * max(result.over_ideal for result in results))
    left.set_title("Time over ideal (tokens / slots)", loc="left", fontsize=11, color=INK)
    for mode, colour in zip(kinds, COLOURS, strict=False):
        rows = [result for result in results if result.mode == mode]
        right.scatter([r.tokens / 1e6 for r in rows], [r.error_v05 for r in rows], color=colour, label=mode, s=36)
    named: list[tuple[float, float]] = []
    widest, highest = max(r.tokens / 1e6 for r in results), max(r.error_v05 for r in results)
    for result in results:
        if result.mode == "stream":
            at = (result.tokens / 1e6, result.error_v05)
            close = any(abs(at[0] - x) < 0.1 * widest and abs(at[1] - y) < 0.03 * highest for x, y in named)
            named.append(at)
            right.annotate(result.name, at, (5, -10 if close else 4), textcoords="offset points", fontsize=8)
    right.set_title("Mean squared error of V0.5's baseline", loc="left", fontsize=11, color=INK)
    right.set_xlabel("million tokens a step")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    open_up(left, right)
    figure.savefig(file, dpi=140)
