"""Options that several commands have, and lists in them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from v05.errors import InputError

RewardRange = Annotated[tuple[float, float], typer.Option(help="Smallest and largest reward.")]
GivenRange = Annotated[
    tuple[float, float] | None, typer.Option(help="Smallest and largest reward.", show_default="-1 1")
]
Cache = Annotated[Path | None, typer.Option(help="File of embeddings; in the user's cache by default.")]
CacheSize = Annotated[float, typer.Option(help="Its size at most.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Read only so many records, for a first look.")]
Texts = Annotated[Path | None, typer.Option(help="JSON object from {dataset}_{id} to prompt.")]
Numbers = Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Set malformed lines aside and go on.")]
StudyFolder = Annotated[Path, typer.Option(help="Folder of the results; a stopped study goes on from it.")]


def listed(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def fractions(text: str) -> tuple[float, ...]:
    """Return the numbers in a comma-separated `--cost`, such as 1/256."""
    try:
        return tuple(float(Fraction(part)) for part in listed(text))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--cost is {text!r}; allowed: numbers and fractions from 0 to 1, by commas") from None


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers in a comma-separated option."""
    try:
        return tuple(int(part) for part in listed(text))
    except ValueError:
        raise InputError(f"{option} is {text!r}; allowed: whole numbers with commas between") from None
