"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
