"""Ragged segments: offsets, lengths, dtypes, and the checks that every op shares."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

# What kernels read, in the order in which the native modules number them.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def lengths(offsets: Tensor) -> Tensor:
    """Lengths `[G]` of the segments that offsets `[G+1]` delimit."""
    return offsets[1:] - offsets[:-1]


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """The segment `[total]` int64 that each element belongs to."""
    ids = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(ids, lengths(offsets), output_size=total)


def segment_sum(values: Tensor, ids: Tensor, segments: int) -> Tensor:
    """Sum `[segments, ...]` of values `[total, ...]` in each segment; empty segments give 0."""
    return values.new_zeros(segments, *values.shape[1:]).index_add(0, ids, values)


def working_dtype(values: Tensor) -> torch.dtype:
    """The dtype statistics come back in: float64 for float64, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype: themselves where they are, at less cost than `to` has."""
    return values if values.dtype == dtype else values.to(dtype)


def constant(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype and without gradient: themselves where they are."""
    return cast(values.detach() if values.requires_grad else values, dtype)


def readable(values: Tensor) -> bool:
    """Whether an op may look at what a tensor holds without waiting: on the CPU, but not while torch.compile traces."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def address(values: Tensor | None) -> int:
    """Address of a tensor's first element as the native modules take it, 0 for None."""
    return 0 if values is None else values.data_ptr()


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Returns value where it is allowed, and raises ValueError naming what is otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return value


def check_tensor(name: str, given: object) -> None:
    """Raises where something else than a tensor is given, such as a list or an array."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}; allowed: a tensor")


def check_vector(name: str, values: Tensor, like: Tensor | None = None, length: int | None = None) -> None:
    """Raises where values is not a one-dimensional floating tensor of that length beside `like`."""
    check_tensor(name, values)
    if values.dim() != 1:
        raise ValueError(f"{name} has shape {list(values.shape)}; allowed: one dimension")
    if not values.dtype.is_floating_point:
        raise TypeError(f"{name} is {values.dtype}; allowed: a floating dtype")
    if length is not None and values.numel() != length:
        raise ValueError(f"{name} has {values.numel()} elements; allowed: {length}")
    if like is not None and values.device != like.device:
        raise ValueError(f"{name} is on {values.device}; allowed: {like.device}, where the other inputs are")


def check_offsets(name: str, offsets: Tensor, like: Tensor) -> None:
    """Raises where offsets is not an int64 vector of at least one element that delimits `like`; values are not read."""
    check_tensor(name, offsets)
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"{name} has shape {list(offsets.shape)}; allowed: one dimension, at least one element")
    if offsets.numel() == 1 and like.numel():
        raise ValueError(f"{name} has 1 element; allowed: at least 2, for there are {like.numel()} elements to delimit")
    if offsets.dtype != torch.int64:
        raise TypeError(f"{name} is {offsets.dtype}; allowed: torch.int64")
    if offsets.device != like.device:
        raise ValueError(f"{name} is on {offsets.device}; allowed: {like.device}, where the other inputs are")


def check_offset_values(name: str, offsets: Tensor, total: int) -> None:
    """Raises where offsets do not start at 0, ascend and end at total; waits for the device."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"{name}[0] is {first}; allowed: 0")
    down = (lengths(offsets) < 0).nonzero()
    if down.numel():
        i = int(down[0]) + 1
        given, before = int(offsets[i]), int(offsets[i - 1])
        raise ValueError(f"{name}[{i}] is {given}; allowed: {before}, the offset before it, or above")
    if last != total:
        raise ValueError(f"{name}[{offsets.numel() - 1}] is {last}; allowed: {total}, the number of elements")


def check_range(
    name: str, values: Tensor, low: float, high: float, offsets: Tensor | None = None, slack: float = 0.0
) -> None:
    """Raises at the first value that is NaN or further than slack outside [low, high]; waits for the device."""
    outside = (~((values >= low - slack) & (values <= high + slack))).nonzero()
    if outside.numel():
        i = int(outside[0])
        where = "" if offsets is None else f" (group {int(torch.searchsorted(offsets, i, right=True)) - 1})"
        raise ValueError(f"{name}[{i}] is {float(values[i]):g}{where}; allowed: {low:g} to {high:g}")
