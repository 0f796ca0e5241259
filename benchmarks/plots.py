"""The plots of the report: times side by side, and each device's roofline."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from benchmarks.harness import OURS

Line = dict[str, str]
COLOURS = {OURS: "#0b6e4f", "torch eager": "#8d99ae", "torch.compile": "#4a6fa5"}
OTHERS = ("#c97b63", "#b5a642", "#7d5a94", "#5f9ea0")
MARKERS = "osD^vPX*<>phd"
WHOLE = ("trl_step",)  # no op of ours, but a step around one: it has no place on a roofline


def grouped(rows: Iterable[Line], *names: str) -> dict[tuple[str, ...], list[Line]]:
    groups: dict[tuple[str, ...], list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def threads_of(count: str) -> str:
    """Of the processor; a GPU's rows have no count."""
    return f"{count} thread{'' if count == '1' else 's'}" if count else ""


def listed(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def number(value: str, unit: str = "") -> str:
    """Three digits at least, without an exponent; empty stays empty."""
    if not value:
        return ""
    size = float(value)
    return (f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.3g}") + unit


def pyplot() -> ModuleType:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def bars(rows: list[Line], path: Path) -> None:
    """Bars of the median with the 20th and 80th percentile, one panel per case."""
    plt = pyplot()
    cases = list(grouped([row for row in rows if row["p50_ms"]], "shape", "dtype", "pass", "threads").items())
    columns = 2 if len(cases) > 1 else 1
    lines = -(-len(cases) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.4 * columns, 2.3 * lines), squeeze=False, layout="constrained"
    )
    rivals = sorted({row["contender"] for row in rows} - set(COLOURS))
    colours = COLOURS | dict(zip(rivals, OTHERS, strict=False))
    for axis, (case, contenders) in zip(axes.flat, cases, strict=False):
        contenders = contenders[::-1]
        middle = [float(row["p50_ms"]) for row in contenders]
        below = [max(0.0, value - float(row["p20_ms"])) for value, row in zip(middle, contenders, strict=True)]
        above = [max(0.0, float(row["p80_ms"]) - value) for value, row in zip(middle, contenders, strict=True)]
        names = [row["contender"] for row in contenders]
        axis.barh(names, middle, xerr=[below, above], color=[colours.get(name, "#999999") for name in names], capsize=2)
        axis.set_xscale("log")
        axis.set_xlim(min(middle) / 2.5, max(m + a for m, a in zip(middle, above, strict=True)) * 6)
        for i, row in enumerate(contenders):
            ratio = "" if row["contender"] == OURS else f"  ({number(row['ratio_to_ours'])} x)"
            axis.text(middle[i] + above[i], i, f"  {number(row['p50_ms'])} ms{ratio}", va="center", fontsize=8)
        axis.set_title(textwrap.fill(listed(*case[:3], threads_of(case[3])), 72), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{rows[0]['op']} on {rows[0]['device']}: milliseconds on a log scale, shorter is better", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def roofline(rows: list[Line], path: Path) -> bool:
    """Our FLOPs a second over FLOPs a byte under the ceilings of one device; False where no row of an op has these."""
    rows = [row for row in rows if row["p50_ms"] and row["copy_gb_s"] and row["contender"] == OURS]
    rows = [row for row in rows if row["op"] not in WHOLE]
    if not rows:
        return False
    plt = pyplot()
    threads = max(rows, key=lambda row: int(row["threads"] or 0))["threads"]
    rows = [row for row in rows if row["threads"] == threads]
    copy = statistics.median(float(row["copy_gb_s"]) for row in rows if row is largest(rows, row["op"]))
    product = statistics.median(float(row["matrix_gflop_s"]) for row in rows)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    places = [int(row["flops"]) / int(row["bytes"]) for row in rows]
    left, right = min(places) / 3, max(*places, product / copy) * 3
    bend = product / copy
    axis.plot([left, bend, right], [left * copy, product, product], color="#333333", lw=1.2)
    axis.text(left * 1.1, left * copy * 3, f"copy: {number(str(copy))} GB/s", fontsize=8)
    axis.text(right, product * 1.1, f"matrix product: {number(str(product))} GFLOP/s", fontsize=8, ha="right")
    for (op,), marker in zip(grouped(rows, "op"), MARKERS, strict=False):
        chosen = [row for row in rows if row["op"] == op]
        rates = [int(row["flops"]) / float(row["p50_ms"]) / 1e6 for row in chosen]
        sizes = [12 + 10 * max(0, len(row["bytes"]) - 4) for row in chosen]
        own = [int(row["flops"]) / int(row["bytes"]) for row in chosen]
        axis.scatter(own, rates, s=sizes, marker=marker, label=op, alpha=0.75)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", ylabel="GFLOP/s")
    axis.legend(fontsize=8, title="larger marks: more bytes", title_fontsize=8)
    axis.set_title(listed(rows[0]["device"], threads_of(threads)), fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def largest(rows: list[Line], op: str) -> Line:
    """The row of an op that moves the most bytes: its copy is out of every cache."""
    return max((row for row in rows if row["op"] == op), key=lambda row: int(row["bytes"]))
