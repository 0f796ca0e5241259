"""Whether what a command is to write can be written, asked before its work."""

from __future__ import annotations

from pathlib import Path

from v05.errors import InputError
from v05.records import check_file


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
