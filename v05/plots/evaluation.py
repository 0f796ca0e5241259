"""The picture of an evaluation: pass@k against k, and how many problems are solved how often."""

from pathlib import Path

from v05.evaluate import Evaluation
from v05.plots.style import COLOURS, INK, open_up


def plot_evaluation(evaluation: Evaluation, title: str, file: Path) -> None:
    """Draw an evaluation to an image.

    Args:
        evaluation: its intervals become a band.
        title: over the picture.
        file: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    ks = list(evaluation.passed)
    values, lows, highs = ([100 * estimate[part] for estimate in evaluation.passed.values()] for part in range(3))
    curve.fill_between(ks, lows, highs, color=COLOURS[0], alpha=0.15, lw=0)
    curve.plot(ks, values, color=COLOURS[0], lw=2, marker="o", ms=4)
    curve.set_xscale("log", base=2)
    curve.set_xticks(ks, [str(k) for k in ks])
    curve.set(ylim=(0, 100), xlabel="k answers", ylabel="% of problems")
    curve.set_title("pass@k, 95 % over problems", loc="left", fontsize=10.5, color=INK)
    counts = [evaluation.right.count(number) for number in range(evaluation.samples + 1)]
    bars.bar(range(evaluation.samples + 1), counts, color=COLOURS[1])
    bars.set(xlabel=f"right answers of {evaluation.samples}", ylabel="problems")
    bars.xaxis.get_major_locator().set_params(integer=True)
    bars.set_title("How often each problem is solved", loc="left", fontsize=10.5, color=INK)
    open_up(curve, bars)
    figure.suptitle(title, x=0.01, ha="left", color=INK, weight="bold")
    figure.savefig(file, dpi=140, facecolor="white")
