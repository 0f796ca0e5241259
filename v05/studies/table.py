"""The table of a study, as it is printed, kept as JSON, and put into a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from v05.files import write_text

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class StudyTable:
    """Numbers with what they are and the command that measures them again.

    Attributes:
        title: what was measured, and on what.
        command: measures it again.
        columns: headings; the first names the row.
        rows: a text for each column.
        notes: what a reader must know beside it, a sentence each.
    """

    title: str
    command: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> StudyTable:
        """Return what `write` wrote."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def markdown(self) -> str:
        """Return title, table, notes and command as Markdown."""
        head = ["| " + " | ".join(self.columns) + " |", "|---|" + "---:|" * (len(self.columns) - 1)]
        body = ["| " + " | ".join(row) + " |" for row in self.rows]
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"{self.title}.\n\n" + "\n".join([*head, *body]) + f"\n{notes}\n```bash\n{self.command}\n```\n"

    def rich(self) -> Table:
        """Return it for a terminal."""
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", caption="\n".join(self.notes) or None)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table
