"""pytest-benchmark entry points: `pytest benchmarks/test_speed.py` times every op on its smallest case."""

import pytest
import torch

from benchmarks.__main__ import BENCHES
from benchmarks.harness import OURS


@pytest.mark.parametrize("contender", [OURS, "torch eager"])
@pytest.mark.parametrize("op", list(BENCHES))
def test_speed(benchmark, op, contender):
    case = next(BENCHES[op].cases(torch.device("cpu"), quick=True))
    run = next(c.run for c in case.contenders if c.name == contender)
    benchmark.group = f"{op} {case.shape}"
    assert all(isinstance(output, torch.Tensor) for output in benchmark(run))
