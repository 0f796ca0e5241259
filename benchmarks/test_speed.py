"""pytest-benchmark entry points: `pytest benchmarks/test_speed.py` times every op and a rival on the smallest case."""

import pytest
import torch

from benchmarks.__main__ import BENCHES
from benchmarks.harness import OURS


@pytest.mark.parametrize("rival", [False, True])
@pytest.mark.parametrize("op", list(BENCHES))
def test_speed(benchmark, op, rival):
    case = next(BENCHES[op].cases(torch.device("cpu"), quick=True))
    run = next(one.run for one in case.contenders if one.run is not None and one.name.startswith(OURS) is not rival)
    benchmark.group = f"{op} {case.shape}"
    assert all(isinstance(output, torch.Tensor) for output in benchmark(run))
