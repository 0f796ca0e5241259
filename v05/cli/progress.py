"""Progress on the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from v05.cli.signals import terminated_like_interrupted


class RateColumn(ProgressColumn):
    """Units done per second, lately."""

    def render(self, task: Task) -> Text:
        """Return the rate, blank until there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


def counting(*columns: ProgressColumn, **options: Any) -> Progress:
    """Return a display of units done and of how many there are, then of more columns; options are rich's."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns, **options)


def noting(column: ProgressColumn, console: Console) -> Progress:
    """Return the same with one more column, the time left, and the field `note` of each task."""
    return counting(column, TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"), console=console)


def progressing() -> Progress:
    """Return the same with the time taken and left, on standard error, where it leaves nothing behind."""
    return counting(TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def batches(items: Sequence[str], size: int, what: str, progress: Progress) -> Iterator[Sequence[str]]:
    """Yield items in batches, showing how many are done."""
    task = progress.add_task(what, total=len(items), note="")
    for start in range(0, len(items), size):
        yield items[start : start + size]
        progress.update(task, completed=min(len(items), start + size))


@contextmanager
def reading(path: str, what: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many bytes of a file, or of standard input, `-`, are read.

    Meanwhile SIGTERM ends the command as Ctrl-C does.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    size = Path(path).stat().st_size if path != "-" and Path(path).is_file() else None
    with terminated_like_interrupted(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=size)
        yield lambda read: progress.update(task, completed=read)


class ProgressReporter:
    """Shows every stage as one line of a rich progress display."""

    def __init__(self, progress: Progress) -> None:
        """Draw on `progress`."""
        self.progress = progress
        self.stage, self.task = "", progress.add_task("", visible=False, note="")

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` units of `stage` are done; `note` says what was measured last."""
        if stage != self.stage:
            self.stage, self.task = stage, self.progress.add_task(stage, total=total, note=note)
        self.progress.update(self.task, completed=done, total=total, note=note)


@contextmanager
def reporting(console: Console) -> Iterator[ProgressReporter]:
    """Yield a reporter that draws on `console`, with rate, time left and note."""
    with noting(RateColumn(), console) as progress:
        yield ProgressReporter(progress)
