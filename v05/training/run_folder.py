"""The folder of a run: its settings, that a run is resumed with, and its files."""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from v05.errors import InputError
from v05.files import write_json
from v05.small_policy import check_size
from v05.tasks import make_task
from v05.training.algorithms import parse_algorithm
from v05.training.changes import changes_of
from v05.training.engines import check_engine
from v05.training.priors import check_prior
from v05.training.settings import Settings

FILES: Final = (  # of a run, beside its folders
    "config.json",
    "model.json",
    "sampling.json",
    "loss.json",
    "data.json",
    "metrics.jsonl",
    "times.jsonl",
    "changes.jsonl",
    "summary.json",
    "curves.png",
)
FOLDERS: Final = ("checkpoints", "policy")
LOCK: Final = ".lock"  # stays, as a file that is removed while it is held would be no lock


def prepare_folder(settings: Settings, folder: Path, resume: bool, changes: bool = False) -> None:
    """Make the folder of a run, or check that the run in it is the one to resume.

    Raises:
        InputError: an unknown algorithm, task, policy or engine; the folder has a run and `resume` is false; or the
            settings differ from those of that run; where `changes` are allowed, see `v05.training.changes.changes_of`.
    """
    parse_algorithm(settings.config.algorithm)
    make_task(settings.config.task)
    check_size(settings.config.policy)
    check_prior(settings.config)
    if settings.model is not None:
        check_engine(settings.model.engine)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in reversed([(name, values) for name, values in settings.files.items() if values]):
            write_json(folder / name, values)
        return
    if not resume:
        raise InputError(f"{folder} has a run already; go on with --resume, or start over with --overwrite")
    changes_of(settings, folder, changes)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes inside the `with` block; a process that dies holds nothing.

    Raises:
        InputError: another process holds it.
    """
    with contextlib.ExitStack() as opened:
        with contextlib.suppress(OSError):  # a folder that cannot be written to, a file system without locks
            file = opened.enter_context((folder / LOCK).open("a"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(f"{folder} is in use by another process; allowed: one at a time") from None
        yield


def remove_run(folder: Path) -> None:
    """Remove the files of a run from `folder`, and nothing else.

    Raises:
        InputError: another process is at work in it.
    """
    with alone_in(folder):
        remove_files(folder)


def remove_files(folder: Path) -> None:
    """Do the same where this process holds the folder: a lock taken twice is let go of with the first of the two."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
