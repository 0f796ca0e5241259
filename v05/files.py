"""Files that appear under their names whole or not at all: text, JSON and tensors."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with _replacing(file) as partial:
        partial.write_bytes(text.encode())


def write_json(file: Path, value: Any) -> None:
    """Write a value as JSON, indented, with a newline at its end."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors.

    Raises:
        OSError: they cannot be written; the disk is full, for example.
    """
    with _replacing(file) as partial:
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(file)) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    return dict(load_file(file))


def finite(value: Any) -> Any:
    """Return a value with None, which JSON has, in the place of all that is not finite, which it does not have."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """Yield a name for a temporary file, which takes the place of `file` once it is written and on the disk."""
    partial = file.with_name(file.name + ".partial")
    yield partial
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, file)
