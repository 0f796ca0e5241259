"""Checkpoints: tensors in safetensors, the rest in one small JSON file, written whole or not at all."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2  # checkpoints that stay; older ones are removed
ASIDE: Final = ".aside"  # ends the name of one whose successor, of the same update, is about to take its place


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        update: updates done when it was written.
        tensors: tensors by file and name.
        state: everything else, as JSON can hold it.
    """

    update: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/<update>` and remove all but the newest `KEPT` checkpoints.

    The files are written to a temporary folder that is renamed when complete, so a crash leaves the previous
    checkpoint in place; one of the same update is set aside until then.

    Args:
        folder: of all checkpoints of a run; made where missing.
        checkpoint: what to write.

    Returns:
        The folder of this checkpoint.
    """
    target = folder / f"{checkpoint.update:06d}"
    partial, aside = target.with_suffix(".partial"), target.with_suffix(ASIDE)
    replaced = (each for each in folder.glob(f"*{ASIDE}") if each.with_suffix("").exists())
    for stale in (*folder.glob("*.partial"), *replaced):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        write_tensors(partial / f"{name}.safetensors", tensors)
    write_text(partial / "state.json", json.dumps({"update": checkpoint.update, **checkpoint.state}, indent=2) + "\n")
    if target.exists():
        os.replace(target, aside)
    os.replace(partial, target)
    shutil.rmtree(aside, ignore_errors=True)
    for old in _finished(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `folder`, or None where there is none."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    tensors = {file.stem: read_tensors(file) for file in sorted(newest.glob("*.safetensors"))}
    return Checkpoint(update=state.pop("update"), tensors=tensors, state=state)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return where the newest checkpoint in `folder` is, or None where there is none."""
    return next(reversed(_finished(folder)), None)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors as safetensors: to a temporary file first, then renamed.

    Raises:
        OSError: they cannot be written; the disk is full, for example.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        save_file(dict(tensors), partial)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(file)) from error
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    return dict(load_file(file))


def write_text(file: Path, text: str) -> None:
    """Write a text file: to a temporary file first, then renamed."""
    _write(file, text.encode())


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def _finished(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; one set aside counts where nothing is in its place."""
    if not folder.is_dir():
        return []
    aside = [entry for entry in folder.glob(f"*{ASIDE}") if not entry.with_suffix("").exists()]
    finished = [entry for entry in folder.iterdir() if entry.name.isdecimal()]
    return sorted(finished + aside, key=lambda entry: int(entry.stem))


class Interrupted(Exception):
    """A stop was asked for, and what is needed to go on is saved."""


class StopRequest:
    """Inside its `with` block, the first SIGINT or SIGTERM asks for a stop; the second has its usual effect."""

    def __init__(self) -> None:
        """Start without a request; the handlers are installed by `with`."""
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the previous handlers back."""
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
