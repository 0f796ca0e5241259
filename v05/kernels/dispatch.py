"""The only place that chooses a backend: which exist, which can run here, and which is taken."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from v05.kernels import wins
from v05.kernels.device import architecture, interpreting

BACKENDS = ("cuda", "triton", "cpu", "reference")
OPS = (
    "shrinkage",
    "calibration",
    "advantage",
    "policy_loss",
    "token_logprob",
    "linear_logprob",
    "query_attention",
)
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}


@cache
def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Says why a backend cannot run an op on a device, or None where it can.

    Args:
        op: one of `OPS`.
        backend: one of `BACKENDS`.
        device_type: torch's name of the device, such as `"cpu"` or `"cuda"`.
    """
    if backend == "reference":
        return None
    if importlib.util.find_spec(f"v05.kernels.{op}.{backend}") is None:
        return f"{op} has no {backend} kernel yet"
    if device_type not in _DEVICES[backend] and not (backend == "triton" and device_type == "cpu" and interpreting()):
        return f"takes {' or '.join(_DEVICES[backend])} tensors, these are on {device_type}"
    native = {"cpu": "v05.kernels._cpu", "cuda": "v05.kernels._cuda"}.get(backend)
    for needed in filter(None, (native, "triton" if backend == "triton" else None)):
        try:
            importlib.import_module(needed)
        except ImportError as error:
            return f"{needed} cannot be imported: {error}"
    return None


def constant_for_compile(function: Callable[..., str]) -> Callable[..., str]:
    """Marks a function as torch.compiler.assume_constant_result does, which would import torch's compiler: a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_compile
def choose(op: str, device_type: str, backend: str | None = None) -> str:
    """Names the backend that runs an op: the one asked for, or the best that can.

    Args:
        op: one of `OPS`.
        device_type: where the tensors are.
        backend: None, or one of `BACKENDS`.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if backend is None:
        return _first(op, device_type, _PREFERENCE.get(device_type, ("reference",)))
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: None or one of {', '.join(map(repr, BACKENDS))}")
    reason = why_not(op, backend, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend


def backend_for(op: str, tensor: Tensor, backend: str | None = None) -> str:
    """Names the backend that runs an op on a tensor: `choose`, and on a GPU the one that won where it was measured.

    Without a measurement of the op, dtype and architecture the order is cuda, triton; of several, the one nearest in
    size counts. While torch.compile traces, sizes are not looked at.

    Args:
        op: one of `OPS`.
        tensor: the input whose device, dtype and number of elements decide.
        backend: None, or one of `BACKENDS`.

    Raises:
        ValueError, RuntimeError: as `choose`.
    """
    if backend is None and tensor.is_cuda and not torch.compiler.is_compiling():
        return _fastest(op, tensor.get_device(), tensor.dtype, tensor.numel().bit_length())
    return choose(op, tensor.device.type, backend)


@cache
def _fastest(op: str, device: int, dtype: torch.dtype, bits: int) -> str:
    win = wins.nearest(wins.recorded(), op, architecture(device), str(dtype)[6:], 1 << bits)
    return _first(op, "cuda", (*(win.order if win else ()), *_PREFERENCE["cuda"]))


def _first(op: str, device_type: str, order: Iterable[str]) -> str:
    return next(name for name in order if why_not(op, name, device_type) is None)


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """The module that runs an op on a backend, imported when first asked for."""
    return importlib.import_module(f"v05.kernels.{op}.{backend}")
