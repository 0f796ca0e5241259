"""Where TRL is missing, the benchmark of a step in it says so in every row."""

import sys

import torch

from benchmarks.bench_trl_step import OPTIONS, cases
from benchmarks.harness import measure


def test_without_trl_every_row_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "v05.integrations.trl", raising=False)
    rows = list(measure(next(cases(torch.device("cpu"), quick=True)), "run", seconds=0.01))
    assert [row.contender for row in rows] == [*OPTIONS, "TRL"]
    assert all(row.note.startswith("not here: ") and "trl" in row.note and not row.p50_ms for row in rows)
