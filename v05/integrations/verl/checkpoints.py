"""The memory of priors in verl's checkpoints: `SaveMemory`'s full name is `trainer.checkpoint_callback_class`.

verl makes a class of that name a part of its trainer, so that this module imports verl at its top.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from v05.files import read_tensors, write_tensors
from v05.integrations.verl.memory import ray_module, running_memory

log = logging.getLogger(__name__)
FILE: Final = "v05_memory.safetensors"  # beside verl's files in a checkpoint


class SaveMemory(CheckpointCallback):
    """Writes what the job's memory knows into every checkpoint; `LookAheadManager` reads it where verl resumes."""

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        """Write the memory's state.

        Raises:
            ValueError: the job has no memory.
        """
        write_tensors(Path(checkpoint_dir) / FILE, ray_module().get(running_memory().state_dict.remote()))


def resumed_from(trainer: Any) -> Path | None:
    """Return the checkpoint that verl goes on from; None where it starts.

    Args:
        trainer: verl's section of that name.
    """
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        return Path(trainer.resume_from_path)
    found = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
    return None if found is None else Path(found)


def load_memory(memory: Any, trainer: Any) -> None:
    """Let a memory go on from the checkpoint that verl resumes from, if it does.

    Args:
        memory: handle of the actor.
        trainer: as for `resumed_from`.
    """
    folder = resumed_from(trainer)
    if folder is None:
        return
    if (folder / FILE).exists():
        ray_module().get(memory.load_state_dict.remote(read_tensors(folder / FILE)))
    else:
        log.warning("%s does not exist: the prior starts anew (SaveMemory writes it)", folder / FILE)
