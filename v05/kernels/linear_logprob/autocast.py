"""What `torch.autocast` does to an output layer: the operands of its product are cast, as `F.linear`'s are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Given = ParamSpec("Given")
Made = TypeVar("Made")
OPERANDS = ("hidden", "weight", "bias")


def as_linear(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Under autocast, the function of hidden, weight and bias in autocast's dtype; float64 stays. Inside, it is off."""

    @functools.wraps(function)
    def called(*given: Given.args, **named: Given.kwargs) -> Made:
        hidden = given[0] if given else named.get("hidden")
        if not isinstance(hidden, Tensor):
            return function(*given, **named)
        kind = hidden.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(*given, **named)
        dtype = torch.get_autocast_dtype(kind)

        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
                return value.to(dtype)
            return value

        operands = [cast(value) for value in given[:2]]
        others = {name: cast(value) if name in OPERANDS else value for name, value in named.items()}
        with torch.autocast(kind, enabled=False):
            return function(*operands, *given[2:], **others)  # type: ignore[arg-type]

    return called
