"""results.csv -> RESULTS.md with a table per op, and a plot of each op's times."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness import OURS

Line = dict[str, str]
BUSY = 0.25  # cores used by others from which a time is marked
COLOURS = {OURS: "#0b6e4f", "torch eager": "#8d99ae", "torch.compile": "#4a6fa5"}
OTHERS = ("#c97b63", "#b5a642", "#7d5a94", "#5f9ea0")

INTRODUCTION = """# Speed beside rivals

Written by `python -m benchmarks` from `results.csv`; every number was measured where its heading says. Rivals run side
by side on the same inputs, one call each in every round, the order reversed from round to round.

* *ms*: median, with the 20th and 80th percentile. **Bold** is the fastest.
* *time / v05*: the median over the rounds of the contender's time over ours; below 1 the rival wins.
* *of copy*: the time in which torch copies as many bytes (those that any implementation must move, read and written)
  over the time taken. Reading is cheaper than writing and caches help small inputs, so it can pass 100 %.
* *MiB*: peak memory on top of the inputs, outputs included.
"""


def latest(path: Path) -> list[Line]:
    """The newest row of every contender, a measured one where there is one, in the order of their first appearance."""
    chosen: dict[tuple[str, ...], Line] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = tuple(row[name] for name in ("op", "device", "threads", "shape", "dtype", "pass", "contender"))
            if row["p50_ms"] or not chosen.get(key, row)["p50_ms"]:
                chosen[key] = row
    return list(chosen.values())


def grouped(rows: Iterable[Line], *names: str) -> dict[tuple[str, ...], list[Line]]:
    groups: dict[tuple[str, ...], list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def threads_of(count: str) -> str:
    return f"{count} thread{'' if count == '1' else 's'}"


def number(value: str, unit: str = "") -> str:
    """Three digits at least, without an exponent; empty stays empty."""
    if not value:
        return ""
    size = float(value)
    return (f"{size:,.0f}" if size >= 100 else f"{size:.1f}" if size >= 10 else f"{size:.3g}") + unit


def table(rows: list[Line]) -> str:
    """One case: a line per contender, fastest first, missing ones last with the reason."""
    measured = sorted((row for row in rows if row["p50_ms"]), key=lambda row: float(row["p50_ms"]))
    lines = ["| contender | ms | p20 to p80 | time / v05 | of copy | MiB | |", "|---|---:|---:|---:|---:|---:|---|"]
    for row in measured:
        best = "**" if row is measured[0] else ""
        spread = f"{number(row['p20_ms'])} to {number(row['p80_ms'])}"
        ceiling = f"{float(row['fraction_of_ceiling']):.0%}"
        cells = [row["contender"], f"{best}{number(row['p50_ms'])}{best}", spread, number(row["ratio_to_ours"])]
        busy = float(row["other_load"] or 0) > BUSY
        note = "; ".join(filter(None, [row["note"], f"others used {row['other_load']} cores" if busy else ""]))
        lines.append("| " + " | ".join([*cells, ceiling, number(row["peak_mib"]), note]) + " |")
    lines += [f"| {row['contender']} | | | | | | {row['note']} |" for row in rows if not row["p50_ms"]]
    return "\n".join(lines)


def losses(rows: list[Line]) -> list[str]:
    """A line for every case in which a rival's time is below ours."""
    won = [row for row in rows if row["contender"] != OURS and float(row["ratio_to_ours"] or 1) < 1]
    lines = []
    for row in won:
        case = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['pass']}, {threads_of(row['threads'])}"
        lines.append(f"* {row['contender']}: {float(row['ratio_to_ours']):.2f} of our time on {case}")
    return lines


def draw(rows: list[Line], path: Path) -> None:
    """Bars of the median with the 20th and 80th percentile, one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        axis.set_title(f"{case[0]}, {case[1]}, {case[2]}, {threads_of(case[3])}", fontsize=9)
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


def write(path: Path, folder: Path) -> None:
    """Writes RESULTS.md and plots/<op>_<device>.png into a folder from the rows at path."""
    rows = latest(path)
    parts = [INTRODUCTION]
    lost = losses(rows)
    parts.append("## Where a rival wins\n\n" + ("\n".join(lost) if lost else "Nowhere in these measurements.") + "\n")
    for (op, device), of_op in grouped(rows, "op", "device").items():
        stem = f"{op}_{'cpu' if '(' in device else 'gpu'}"
        draw(of_op, folder / "plots" / f"{stem}.png")
        parts.append(f"## {op}\n\n{device}\n\n![{op}](plots/{stem}.png)\n")
        for (shape, dtype, direction, threads), case in grouped(of_op, "shape", "dtype", "pass", "threads").items():
            newest = max(case, key=lambda row: row["run"])
            where = f"{threads_of(threads)}, {newest['versions']}, commit {newest['commit']}, {newest['run'][:10]}"
            parts.append(f"### {shape}, {dtype}, {direction}\n\n{where}\n\n{table(case)}\n")
    (folder / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")
