"""Which GPU backend was fastest where it was measured: wins.json, written by `python -m benchmarks --write-wins`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from math import log2
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("wins.json")


class Win(NamedTuple):
    """One case measured on one GPU: the backends from the fastest to the slowest in one run, and its commit."""

    op: str
    architecture: str  # such as "sm_90"
    dtype: str  # such as "bfloat16"
    elements: int  # of the tensor that the op is dispatched by
    order: tuple[str, ...]
    commit: str


@cache
def recorded() -> tuple[Win, ...]:
    """The wins that the package was built with."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(Win(**row | {"order": tuple(row["order"])}) for row in rows)


def nearest(wins: Sequence[Win], op: str, architecture: str, dtype: str, elements: int) -> Win | None:
    """The win of the same op, architecture and dtype whose size is the nearest by its ratio, or None."""
    same = [win for win in wins if (win.op, win.architecture, win.dtype) == (op, architecture, dtype)]
    return min(same, key=lambda win: abs(log2(win.elements) - log2(max(elements, 1))), default=None)
