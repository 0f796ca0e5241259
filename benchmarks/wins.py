"""results.csv -> v05/kernels/wins.json: where our backends ran side by side on a GPU, which was the fastest."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import GPU_BACKENDS, OURS
from benchmarks.plots import Line, grouped
from v05.kernels.wins import Win


def wins_of(rows: list[Line]) -> list[Win]:
    """The order of our backends in the newest run of each case; the slowest pass of a case, the last timed, decides.

    A backend whose numbers differed did not run. A call takes as long as the GPU, or the host where that is longer, as
    it is for small inputs.

    Args:
        rows: lines of results.csv, oldest first.
    """
    own = [row for row in rows if row["contender"].removeprefix(f"{OURS} ") in GPU_BACKENDS and row["p50_ms"]]
    own = [row for row in own if row["architecture"] and int(row["elements"] or 0) and "differs" not in row["note"]]
    chosen = {}
    for (op, arch, dtype, elements, *_), raced in grouped(
        own, "op", "architecture", "dtype", "elements", "shape", "run", "pass"
    ).items():
        if len(raced) > 1:
            ranked = sorted(raced, key=seconds_of)
            order = tuple(row["contender"].removeprefix(f"{OURS} ") for row in ranked)
            chosen[op, arch, dtype, int(elements)] = Win(op, arch, dtype, int(elements), order, ranked[0]["commit"])
    return sorted(chosen.values())


def seconds_of(row: Line) -> float:
    """What a call takes on its own."""
    return max(float(row["p50_ms"]) / 1e3, float(row["host_us"] or 0) / 1e6)


def write(rows: list[Line], path: Path) -> int:
    """Writes the wins, one a line, and returns how many there are."""
    wins = wins_of(rows)
    lines = ",\n".join(json.dumps(win._asdict()) for win in wins)
    path.write_text(f"[\n{lines}\n]\n" if wins else "[]\n", encoding="utf-8")
    return len(wins)
