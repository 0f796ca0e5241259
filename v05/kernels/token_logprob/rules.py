"""What logits, targets and temperatures are allowed to be."""

from __future__ import annotations

import torch
from torch import Tensor

from v05.kernels import segments

MOST_COLUMNS = 2**30  # places in a row are counted in 32 bits
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6


def rows_of(logits: Tensor) -> Tensor:
    """The logits, copied only where the elements of a row do not lie side by side."""
    return logits if logits.shape[1] == 1 or logits.stride(1) == 1 else logits.contiguous()


def temperature_error(name: str, value: float) -> ValueError:
    """The error of a temperature that is NaN or out of bounds."""
    return ValueError(f"{name} is {value:g}; allowed: {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}")


def check_shapes(logits: Tensor, targets: Tensor, temperature: float | Tensor) -> None:
    """Raises where logits `[T, V]`, targets `[T]` and temperature do not fit together; no element is read."""
    segments.check_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        hint = ", as of logits.flatten(0, -2) and targets.flatten()" if logits.dim() > 2 else ""
        raise ValueError(f"logits has shape {list(logits.shape)}; allowed: two dimensions, at least one column{hint}")
    if logits.shape[1] > MOST_COLUMNS:
        raise ValueError(f"logits has {logits.shape[1]} columns; allowed: up to {MOST_COLUMNS}")
    if logits.dtype not in segments.DTYPES:
        raise TypeError(f"logits is {logits.dtype}; allowed: {', '.join(map(str, segments.DTYPES))}")
    check_rows(targets, temperature, logits, "the logits are")


def check_rows(targets: Tensor, temperature: float | Tensor, like: Tensor, where: str) -> None:
    """Raises where targets and temperature do not go with the rows of `like`; no element is read."""
    segments.check_tensor("targets", targets)
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
        if vector.shape != like.shape[:1]:
            raise ValueError(f"{name} has shape {list(vector.shape)}; allowed: [{like.shape[0]}], one per row")
        if vector.device != like.device:
            raise ValueError(f"{name} is on {vector.device}; allowed: {like.device}, where {where}")


def by_row(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """Temperatures `[T]` without autograd, beside 1; or None, beside the one of all rows."""
    return (temperature.detach(), 1.0) if isinstance(temperature, Tensor) else (None, float(temperature))


def bad_rows(targets: Tensor, temperatures: Tensor | None, columns: int, kept: Tensor) -> Tensor:
    """Rows `[T]` that count and have a target or temperature that is not allowed."""
    bad = (targets < 0) | (targets >= columns)
    if temperatures is not None:
        bad |= ~((temperatures >= LOWEST_TEMPERATURE) & (temperatures <= HIGHEST_TEMPERATURE))
    return bad & kept


def row_error(row: int, targets: Tensor, temperatures: Tensor | None, columns: int, but: str) -> ValueError:
    """The error of a row of `bad_rows`."""
    if temperatures is None or not 0 <= int(targets[row]) < columns:
        return ValueError(f"targets[{row}] is {int(targets[row])}; allowed: 0 to {columns - 1}{but}")
    return temperature_error(f"temperature[{row}]", float(temperatures[row]))


def check_targets(targets: Tensor, temperatures: Tensor | None, columns: int, kept: Tensor, but: str = "") -> None:
    """Raises at the first row that counts and has a bad target or temperature; waits for the device."""
    where = bad_rows(targets, temperatures, columns, kept).nonzero()
    if where.numel():
        raise row_error(int(where[0]), targets, temperatures, columns, but)


def check_values(logits: Tensor, targets: Tensor, temperatures: Tensor | None, ignore_index: int) -> None:
    """Raises at the first row that is not ignored and has a bad target, temperature or logit; waits for the device."""
    columns = logits.shape[1]
    kept = targets != ignore_index
    bad = bad_rows(targets, temperatures, columns, kept)
    bad = (bad | (~(logits < float("inf")).all(1) & kept)).nonzero()
    if not bad.numel():
        return
    row = int(bad[0])
    but = f", or ignore_index {ignore_index}"
    column = int((~(logits[row] < float("inf"))).int().argmax())
    value = float(logits[row, column])
    if 0 <= int(targets[row]) < columns and not value < float("inf"):
        raise ValueError(f"logits[{row}, {column}] is {value:g}; allowed: finite or -inf, in a row not ignored")
    raise row_error(row, targets, temperatures, columns, but)
