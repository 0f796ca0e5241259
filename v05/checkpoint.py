"""Checkpoints: tensors in safetensors, the rest in one small JSON file, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer

from v05.files import read_tensors, write_json, write_tensors

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
    write_json(partial / "state.json", {"update": checkpoint.update, **checkpoint.state})
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


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser keeps of each parameter, by the parameter's number and the name of what is kept."""
    entries = optimizer.state_dict()["state"].items()
    return {f"{number}.{name}": value for number, entry in entries for name, value in entry.items()}


def optimizer_entries(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Return what `optimizer_tensors` was made of: by number, then by name, as `load_state_dict` takes it."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = value
    return entries


def _finished(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; one set aside counts where nothing is in its place."""
    if not folder.is_dir():
        return []
    aside = [entry for entry in folder.glob(f"*{ASIDE}") if not entry.with_suffix("").exists()]
    finished = [entry for entry in folder.iterdir() if entry.name.isdecimal()]
    return sorted(finished + aside, key=lambda entry: int(entry.stem))
