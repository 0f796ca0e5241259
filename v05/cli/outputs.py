"""What commands share around their work: whether outputs can be written, what they are, the range not given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import typer
from rich.table import Table

from v05.errors import InputError
from v05.records import check_file, whole_file

DEFAULT_RANGE: Final = (-1.0, 1.0)


def warn_of_range(given: tuple[float, float] | None, zero_or_one: bool) -> None:
    """Say on standard error that values of 0 and 1 were taken for values in the default range."""
    if given is None and zero_or_one:
        told = "all values are 0 or 1 and the range is -1 to 1; for 0 and 1 give --reward-range 0 1"
        typer.echo(f"v05: warning: {told}", err=True)


def check_outputs(output: Path | None, plot: Path | None) -> None:
    """Raise InputError where the file of numbers or the picture could not be written after all the work."""
    if output is not None:
        check_file(output)
    if plot is not None:
        from matplotlib.figure import Figure

        known = Figure().canvas.get_supported_filetypes()
        suffix = plot.suffix.removeprefix(".").lower()
        if suffix and suffix not in known:
            raise InputError(f"--plot {plot}: the format {suffix!r} is unknown; allowed: {', '.join(sorted(known))}")
        try:
            check_file(plot)
        except InputError as error:
            raise InputError(f"--plot {error}") from None


@contextmanager
def drawing(plot: Path) -> Iterator[None]:
    """Say of what goes wrong inside that `--plot` is meant."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(f"--plot {plot}: {error}") from None


def write_numbers(output: Path, found: Any) -> None:
    """Write what was found as JSON."""
    with whole_file(output) as out:
        out.write(json.dumps(found, indent=2) + "\n")


def table_of_facts(title: str) -> Table:
    """Return a table without rows, of names and numbers."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table
