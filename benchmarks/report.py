"""results.csv -> RESULTS.md with a table per op, a plot of each op's times, and a roofline of each device."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from benchmarks import plots
from benchmarks.harness import OURS
from benchmarks.plots import Line, grouped, listed, number, threads_of
from benchmarks.wins import seconds_of
from v05.studies.table import StudyTable

CASE = ("op", "shape", "dtype", "pass", "threads")  # what contenders have in common that are compared
BUSY = 0.25  # cores used by others from which a time is marked

INTRODUCTION = """# Speed beside rivals

Written by `python -m benchmarks` from `results.csv`; every number was measured where its heading says. Rivals run side
by side on the same inputs, one call each in every round, the order reversed from round to round.

* *ms*: median, with the 20th and 80th percentile. **Bold** is the fastest.
* *time / v05*: the median over the rounds of the contender's time over ours; below 1 the rival wins. Where one of the
  two is timed by a graph and the other is not, it is what they take as called: the longer of the GPU's time and the
  host's.
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
    """The newest row of every contender that its case still has, a measured one where there is one, in the order of
    their first appearance."""
    chosen: dict[tuple[str, ...], Line] = {}
    newest: dict[tuple[str, ...], tuple[str, set[str]]] = {}  # of each case, the last run and its contenders
    for line in as_called(read(path)):
        row = line | {"threads": ""} if line["architecture"] else line
        case, name = tuple(row[name] for name in ("device", "threads", *CASE)), row["contender"]
        if newest.get(case, ("",))[0] != row["run"]:
            newest[case] = (row["run"], set())
        newest[case][1].add(name)
        if row["p50_ms"] or not chosen.get((*case, name), row)["p50_ms"]:
            chosen[*case, name] = row
    return [row for (*case, name), row in chosen.items() if name in newest[tuple(case)][1]]


def as_called(rows: list[Line]) -> list[Line]:
    """The rows; a ratio of times by unlike clocks is that of what callers wait for, as a graph leaves out the host."""

    def measurement(row: Line) -> tuple[str, ...]:
        return tuple(row[name] for name in ("run", "device", *CASE))

    own = {measurement(row): row for row in rows if row["contender"] == OURS}
    compared = []
    for row in rows:
        ours = own.get(measurement(row), row)
        if row["timed_by"] != ours["timed_by"] and row["p50_ms"] and ours["p50_ms"]:
            note = "; ".join(filter(None, (row["note"], "ratio as called")))
            row = row | {"ratio_to_ours": f"{seconds_of(row) / seconds_of(ours):.3g}", "note": note}
        compared.append(row)
    return compared


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


def overview(rows: list[Line]) -> str:
    """A line per case: our time, and that of the fastest rival over ours."""
    lines = ["| op | case | v05, ms | of ceiling | fastest rival | its time / v05 |", "|---|---|---:|---:|---|---:|"]
    together = [row for of_op in grouped(rows, "op").values() for row in of_op]
    for (op, shape, dtype, direction, threads), case in grouped(together, *CASE).items():
        measured = [row for row in case if row["p50_ms"]]
        own = next((row for row in measured if row["contender"] == OURS), None)
        rivals = [row for row in measured if not row["contender"].startswith(OURS)]
        if own is None or not rivals:
            continue
        best = min(rivals, key=lambda row: float(row["p50_ms"]))
        mark = "**" if float(best["ratio_to_ours"]) < 1 else ""
        cells = [op, listed(shape, dtype, direction, threads_of(threads)), number(own["p50_ms"])]
        cells += [f"{float(own['fraction_of_ceiling']):.0%}", best["contender"]]
        lines.append("| " + " | ".join([*cells, f"{mark}{number(best['ratio_to_ours'])}{mark}"]) + " |")
    return "\n".join(lines)


def of_device(device: str, kind: str, rows: list[Line], folder: Path) -> list[str]:
    """What was measured on one device: roofline, overview, then each op's plot and tables; writes the plots, whose
    names end in the kind."""
    parts = [f"## {device}\n"]
    if plots.roofline(rows, folder / "plots" / f"roofline_{kind}.png"):
        parts.append(f"![roofline](plots/roofline_{kind}.png)\n")
    parts.append(overview(rows) + "\n")
    for (op,), of_op in grouped(rows, "op").items():
        plots.bars(of_op, folder / "plots" / f"{op}_{kind}.png")
        parts.append(f"### {op}, {device}\n\n![{op}](plots/{op}_{kind}.png)\n")
        for (_, shape, dtype, direction, threads), case in grouped(of_op, *CASE).items():
            newest = max(case, key=lambda row: row["run"])
            made = (newest["versions"], f"commit {newest['commit']}", newest["run"][:10])
            where = listed(threads_of(threads), *made)
            parts.append(f"#### {listed(shape, dtype, direction)}\n\n{where}\n\n{table(case)}\n")
    return parts


def write(path: Path, folder: Path) -> None:
    """Writes RESULTS.md and plots/<op>_<device>.png into a folder from the rows at path and its studies/*.json."""
    rows = latest(path)
    lost = losses(rows)
    parts = [INTRODUCTION, "## Where a rival wins\n\n" + ("\n".join(lost) or "Nowhere in these measurements.") + "\n"]
    seen = Counter[str]()
    for (device,), measured in grouped(rows, "device").items():
        kind = "cpu" if "(" in device else "gpu"
        seen[kind] += 1
        parts += of_device(device, kind + (f"_{seen[kind]}" if seen[kind] > 1 else ""), measured, folder)
    studies = [StudyTable.read(file) for file in sorted((folder / "studies").glob("*.json"))]
    parts += ["## Studies\n\n" + "\n".join(f"### {study.markdown()}" for study in studies)] if studies else []
    (folder / "RESULTS.md").write_text("\n".join(parts), encoding="utf-8")
