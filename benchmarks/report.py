"""results.csv -> RESULTS.md with a table per op, a plot of each op's times, and a roofline of each device."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks import plots
from benchmarks.harness import OURS
from benchmarks.plots import Line, grouped, listed, number, threads_of
from v05.studies.table import StudyTable

BUSY = 0.25  # cores used by others from which a time is marked

INTRODUCTION = """# Speed beside rivals

Written by `python -m benchmarks` from `results.csv`; every number was measured where its heading says. Rivals run side
by side on the same inputs, one call each in every round, the order reversed from round to round.

* *ms*: median, with the 20th and 80th percentile. **Bold** is the fastest.
* *time / v05*: the median over the rounds of the contender's time over ours; below 1 the rival wins.
* *of ceiling*: over the time taken, the time in which torch copies as many bytes (those that any implementation must
  move, read and written) or multiplies matrices with as many FLOPs, whichever is longer. Reading is cheaper than
  writing and caches help small inputs, so it can pass 100 %.
* *MiB*: peak memory on top of the inputs, outputs included.
* *host*: microseconds that a call keeps the host of a GPU busy. On a GPU the milliseconds are those of a replayed CUDA
  graph, without the host, on inputs that are not in its cache; where a call cannot be captured, of CUDA events.
"""


def read(path: Path) -> list[Line]:
    """All rows, the oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def latest(path: Path) -> list[Line]:
    """The newest row of every contender, a measured one where there is one, in the order of their first appearance."""
    chosen: dict[tuple[str, ...], Line] = {}
    for line in read(path):
        row = line | {"threads": ""} if line["architecture"] else line
        key = tuple(row[name] for name in ("op", "device", "threads", "shape", "dtype", "pass", "contender"))
        if row["p50_ms"] or not chosen.get(key, row)["p50_ms"]:
            chosen[key] = row
    return list(chosen.values())


def table(rows: list[Line]) -> str:
    """One case: a line per contender, fastest first, missing ones last with the reason."""
    measured = sorted((row for row in rows if row["p50_ms"]), key=lambda row: float(row["p50_ms"]))
    head = "| contender | ms | p20 to p80 | time / v05 | of ceiling | MiB | host | |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|---|"]
    for row in measured:
        best = "**" if row is measured[0] else ""
        spread = f"{number(row['p20_ms'])} to {number(row['p80_ms'])}"
        ceiling = f"{float(row['fraction_of_ceiling']):.0%}"
        cells = [row["contender"], f"{best}{number(row['p50_ms'])}{best}", spread, number(row["ratio_to_ours"])]
        busy = float(row["other_load"] or 0) > BUSY
        notes = [row["note"], f"others used {row['other_load']} cores" if busy else ""]
        notes.append("by events" if row["timed_by"] == "events" else "")
        cells += [ceiling, number(row["peak_mib"]), number(row["host_us"]), "; ".join(filter(None, notes))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"| {row['contender']} | | | | | | | {row['note']} |" for row in rows if not row["p50_ms"]]
    return "\n".join(lines)


def losses(rows: list[Line]) -> list[str]:
    """A line for every case in which a rival's time is below ours."""
    rivals = [row for row in rows if not row["contender"].startswith(OURS)]
    won = [row for row in rivals if float(row["ratio_to_ours"] or 1) < 1]
    lines = []
    for row in won:
        where = threads_of(row["threads"]) or row["device"]
        case = listed(row["op"], row["shape"], row["dtype"], row["pass"], where)
        lines.append(f"* {row['contender']}: {float(row['ratio_to_ours']):.2f} of our time on {case}")
    return lines


def write(path: Path, folder: Path) -> None:
    """Writes RESULTS.md and plots/<op>_<device>.png into a folder from the rows at path and its studies/*.json."""
    rows = latest(path)
    parts = [INTRODUCTION]
    lost = losses(rows)
    parts.append("## Where a rival wins\n\n" + ("\n".join(lost) if lost else "Nowhere in these measurements.") + "\n")
    for (device,), of_device in grouped(rows, "device").items():
        kind = "cpu" if "(" in device else "gpu"
        if plots.roofline(of_device, folder / "plots" / f"roofline_{kind}.png"):
            parts.append(f"## Roofline\n\n{device}\n\n![roofline](plots/roofline_{kind}.png)\n")
    for (op, device), of_op in grouped(rows, "op", "device").items():
        stem = f"{op}_{'cpu' if '(' in device else 'gpu'}"
        plots.bars(of_op, folder / "plots" / f"{stem}.png")
        parts.append(f"## {op}\n\n{device}\n\n![{op}](plots/{stem}.png)\n")
        for (shape, dtype, direction, threads), case in grouped(of_op, "shape", "dtype", "pass", "threads").items():
            newest = max(case, key=lambda row: row["run"])
            made = (newest["versions"], f"commit {newest['commit']}", newest["run"][:10])
            where = listed(threads_of(threads), *made)
            parts.append(f"### {shape}, {dtype}, {direction}\n\n{where}\n\n{table(case)}\n")
    studies = [StudyTable.read(file) for file in sorted((folder / "studies").glob("*.json"))]
    parts += ["## Studies\n\n" + "\n".join(f"### {study.markdown()}" for study in studies)] if studies else []
    (folder / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")
