"""The device a launch goes to, and whether Triton's interpreter stands in for one."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

_HERE = nullcontext()  # may be entered any number of times


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current device for a launch; does nothing where it is, or for CPU tensors."""
    here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(tensor.device)


def stream_of(tensor: Tensor) -> int:
    """Address of the current stream of the tensor's GPU."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())


@cache
def architecture(index: int) -> str:
    """What a GPU's code is compiled for, such as `"sm_90"`, or `"gfx942"` on AMD."""
    properties = torch.cuda.get_device_properties(index)
    amd: str = getattr(properties, "gcnArchName", "").split(":")[0]
    return amd if torch.version.hip else f"sm_{properties.major}{properties.minor}"
