"""Tests of every op on a GPU, run by `make gpu`; not collected where there is none.

V05_DRY_RUN=1 runs the same code on the CPU with smaller inputs, but for what only CUDA has (graphs, streams, waiting):

    V05_DRY_RUN=1 python -m pytest tests/gpu                          backends reference and cpu
    V05_DRY_RUN=1 TRITON_INTERPRET=1 python -m pytest tests/gpu       backend triton, in its interpreter

`-m large` selects the inputs of several gigabytes, which need the GPU to themselves.
"""

import os

import torch

collect_ignore_glob = [] if torch.cuda.is_available() or os.environ.get("V05_DRY_RUN") == "1" else ["test_*.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes gigabytes of the GPU's memory")
