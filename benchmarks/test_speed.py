"""pytest-benchmark entry points: `pytest benchmarks/test_speed.py` times every op and a rival on the smallest case."""

from importlib.util import find_spec

import pytest
import torch

from benchmarks.__main__ import BENCHES
from benchmarks.harness import OURS

OPS = [op for op in BENCHES if op != "trl_step" or find_spec("trl")]  # which has an environment of its own


@pytest.mark.parametrize("rival", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_speed(benchmark, op, rival):
    case = next(BENCHES[op].cases(torch.device("cpu"), quick=True))
    run = next(one.run for one in case.contenders if one.run is not None and one.name.startswith(OURS) is not rival)
    benchmark.group = f"{op} {case.shape}"
    assert all(isinstance(output, torch.Tensor) for output in benchmark(run))
