"""What logits, targets and temperatures are allowed to be."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6


def rows_of(logits: Tensor) -> Tensor:
    """The logits, copied only where the elements of a row do not lie side by side."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def temperature_error(name: str, value: float) -> ValueError:
    """The error of a temperature that is NaN or out of bounds."""
    return ValueError(f"{name} is {value:g}; allowed: {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}")


def check_shapes(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> None:
    """Raises where logits `[T, V]`, targets `[T]` and temperature do not fit together; no element is read."""
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}; allowed: two dimensions, at least one column")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits is {logits.dtype}; allowed: {', '.join(map(str, DTYPES))}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}; allowed: torch.int64")
    vectors = {"targets": targets}
    if isinstance(temperature, Tensor):
        if not temperature.dtype.is_floating_point:
            raise TypeError(f"temperature is {temperature.dtype}; allowed: a float, or a tensor of a floating dtype")
        vectors["temperature"] = temperature
    elif not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise temperature_error("temperature", temperature)
    for name, vector in vectors.items():
        if vector.shape != logits.shape[:1]:
            raise ValueError(f"{name} has shape {list(vector.shape)}; allowed: [{logits.shape[0]}], one per row")
        if vector.device != logits.device:
            raise ValueError(f"{name} is on {vector.device}; allowed: {logits.device}, where the logits are")


def check_values(logits: Tensor, targets: Tensor, temperatures: Tensor | None, ignore_index: int) -> None:
    """Raises at the first row that is not ignored and has a bad target, temperature or logit; waits for the device."""
    columns = logits.shape[1]
    kept = targets != ignore_index
    bad = (targets < 0) | (targets >= columns)
    if temperatures is not None:
        bad |= ~((temperatures >= LOWEST_TEMPERATURE) & (temperatures <= HIGHEST_TEMPERATURE))
    bad = ((bad | ~(logits < float("inf")).all(1)) & kept).nonzero()
    if not bad.numel():
        return
    row = int(bad[0])
    if not 0 <= int(targets[row]) < columns:
        allowed = f"0 to {columns - 1}, or ignore_index {ignore_index}"
        raise ValueError(f"targets[{row}] is {int(targets[row])}; allowed: {allowed}")
    column = int((~(logits[row] < float("inf"))).int().argmax())
    value = float(logits[row, column])
    if not value < float("inf"):
        raise ValueError(f"logits[{row}, {column}] is {value:g}; allowed: finite or -inf, in a row not ignored")
    assert temperatures is not None
    raise temperature_error(f"temperature[{row}]", float(temperatures[row]))
