"""What may change when a run is resumed, and the note of it, so that it stays known what was computed with what."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from v05.checkpoint import newest_checkpoint
from v05.errors import InputError
from v05.files import write_json
from v05.tasks.problems import Problems
from v05.training.algorithms import parse_algorithm
from v05.training.config import CHANGEABLE, read_settings
from v05.training.metrics import append_line
from v05.training.ranks import Ranks
from v05.training.settings import Settings

FILE: Final = "changes.jsonl"

logger = logging.getLogger(__name__)


def changes_of(settings: Settings, folder: Path, allowed: bool) -> dict[str, list[Any]]:
    """Return the old and the new value of every setting that differs from those of the run in a folder.

    Args:
        settings: to go on with.
        folder: of the run.
        allowed: whether `CHANGEABLE` and the rate in an algorithm's name may differ, and rollouts be more; in a
            finished run, which computes nothing, only where they are.

    Raises:
        InputError: a setting differs that may not.
    """
    changes: dict[str, list[Any]] = {}
    for file, values in settings.files.items():
        saved = read_settings(folder / file) if (folder / file).exists() else {}
        differing = [name for name in {**saved, **values} if saved.get(name) != values.get(name)]
        changes |= {name: [saved.get(name), values.get(name)] for name in differing}
    if "learning_rate" in changes and parse_algorithm(settings.config.algorithm).learning_rate is not None:
        raise InputError(f"learning_rate is given with {settings.config.algorithm}; allowed: the rate in its name")
    computes = "rollouts" in changes or not (folder / "summary.json").exists()
    for name, (old, new) in changes.items():
        free = allowed and _may_change(name, old, new)
        if not (free and computes):
            more = " or more" if allowed and name == "rollouts" else ", unless rollouts are more" if free else ""
            raise InputError(f"{name} is {new!r}; allowed when resuming {folder}: {old!r}{more}")
    return changes


def _may_change(name: str, old: Any, new: Any) -> bool:
    if name == "algorithm":
        one, other = (dataclasses.replace(parse_algorithm(text), name="", learning_rate=None) for text in (old, new))
        return one == other
    return new > old if name == "rollouts" else name in CHANGEABLE


def make_changes(settings: Settings, folder: Path, allowed: bool) -> None:
    """Note what differs from the run in a folder, from its newest checkpoint on, and make it the run's settings.

    Only for a process that holds the folder. A crash in between leaves a run that can be resumed with the same changes.

    Raises:
        InputError: a setting differs that may not, see `changes_of`.
    """
    changes = changes_of(settings, folder, allowed)
    if not changes:
        return
    (folder / "summary.json").unlink(missing_ok=True)
    note_changes(folder, changes)
    write_json(folder / "config.json", settings.config.to_dict())


def note_changes(folder: Path, changes: Mapping[str, list[Any]]) -> None:
    """Note and log what has changed since the newest checkpoint of the run in a folder: old and new values by name."""
    newest = newest_checkpoint(folder / "checkpoints")
    update = 0 if newest is None else int(newest.stem)
    append_line(folder / FILE, {"update": update, **changes})
    for name, (old, new) in changes.items():
        logger.warning("%s was %s until update %d, and is %s after it", name, old, update, new)


def check_data(folder: Path, task: Problems, data: str, ranks: Ranks) -> None:
    """Note a run's data when it begins; when it is resumed, note a verifier whose file has changed since.

    Args:
        folder: of the run.
        task: its problems.
        data: where they are from, for the error.
        ranks: all of them call this.

    Raises:
        InputError: the problems are not those that the run began with.
    """
    file = folder / "data.json"
    found = {"problems": len(task), "digest": task.digest, "columns": task.columns}
    mine = {**found, "verifier_file": task.verifier_file}
    before = ranks.broadcast(read_settings(file) if file.exists() else mine)
    if found | {name: value for name, value in before.items() if name in found} != found:
        raise InputError(f"{data} has changed since the run in {folder} began; allowed: the same problems")
    if ranks.leads:
        if (old := before.get("verifier_file")) not in (None, task.verifier_file):
            note_changes(folder, {"verifier_file": [old, task.verifier_file]})
        write_json(file, mine)


def way_out(folder: Path) -> str:
    """Return how a run goes on whose numbers are no longer finite."""
    newest = newest_checkpoint(folder / "checkpoints")
    return (
        f"the run is saved in {newest}; --resume repeats this, unless learning_rate (or that in the algorithm's name) "
        "or micro_batches changes, or that folder is removed, which goes back to the one before"
    )
