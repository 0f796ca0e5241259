"""Progress of stages on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Units done per second, lately."""

    def render(self, task: Task) -> Text:
        """Return the rate, blank until there is one."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


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
    """A reporter that draws on `console`, with rate, time left and note."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn())
    late = (TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *late, console=console) as progress:
        yield ProgressReporter(progress)
