"""Tests of every op on a GPU, run by `make gpu`; not collected where there is none.

V05_DRY_RUN=1 runs the same code on the CPU with smaller inputs, but for what only CUDA has (graphs, streams, waiting):

    V05_DRY_RUN=1 python -m pytest tests/gpu                          backends reference and cpu
    V05_DRY_RUN=1 TRITON_INTERPRET=1 python -m pytest tests/gpu       backend triton, in its interpreter
    V05_EMULATED=1 python -m pytest tests/gpu                         backend cuda, over tests/emulator, at full sizes

`-m large` selects the inputs of several gigabytes, which need the GPU to themselves.
"""

import os

import torch
from emulated import EMULATED, install

if EMULATED:
    install()

ANYWHERE = EMULATED or os.environ.get("V05_DRY_RUN") == "1"
collect_ignore_glob = [] if torch.cuda.is_available() or ANYWHERE else ["test_*.py"]
collect_ignore = ["test_gpu_linear_logprob.py"] if EMULATED else []  # it has no kernel in CUDA C++


def pytest_configure(config):
    config.addinivalue_line("markers", "large: takes gigabytes of the GPU's memory")
