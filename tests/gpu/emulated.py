"""The CUDA kernels on CPU tensors: the module that tests/emulator builds, in place of the one for a GPU."""

import importlib.machinery
import importlib.util
import os
import sys

from v05.kernels import device, dispatch

EMULATED = os.environ.get("V05_EMULATED") == "1"


def install() -> None:
    """Makes `backend="cuda"` run there, before anything imports it.

    Raises:
        FileNotFoundError: it was not built.
    """
    from build_emulated import MODULE

    if not MODULE.exists():
        raise FileNotFoundError(f"{MODULE} is missing; `python tests/build_emulated.py` builds it")
    name = "v05.kernels._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(MODULE))
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(sys.modules[name])
    sys.modules["v05.kernels"]._cuda = sys.modules[name]
    device.stream_of = lambda tensor: 0
    dispatch._DEVICES = dispatch._DEVICES | {"cuda": ("cpu",)}
