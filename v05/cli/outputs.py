"""What commands share around their work: whether outputs can be written, and the range that was not given."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from v05.errors import InputError
from v05.records import check_file

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
