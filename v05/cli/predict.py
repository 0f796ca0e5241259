"""`v05 predict`: the probability that a policy succeeds at each prompt, from what it did on others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from v05.cli.models import make_model
from v05.cli.options import Cache, CacheSize, GivenRange, SkipBad
from v05.cli.outputs import DEFAULT_RANGE, check_outputs, drawing, table_of_facts, warn_of_range
from v05.cli.progress import reading
from v05.errors import InputError
from v05.predict import Prediction, predict_file
from v05.records import bad_path
from v05.value.model import Record


def prediction_table(summary: Prediction, skip_bad: bool) -> Table:
    """Return a table of what was predicted, for the terminal."""
    table = table_of_facts("V0")
    table.add_row("prompts in the context", f"{summary.context:,}")
    table.add_row("prompts predicted", f"{summary.prompts:,}")
    if summary.prompts:
        table.add_row("mean probability of success", f"{summary.total / summary.prompts:.4f}")
    if skip_bad:
        table.add_row("bad lines set aside", f"{summary.bad_lines:,}")
    if summary.rate:
        table.add_section()
        table.add_row("prompts with a score, not in the context", f"{len(summary.rate):,}")
        table.add_row("AUC", "- (one class)" if math.isnan(summary.auc) else f"{summary.auc:.4f}")
        table.add_row("mean squared error of the reward", f"{summary.squared_error:.4f}")
        table.add_row("mean calibration gap", f"{summary.reliability.gap:.4f}")
    return table


def predict(
    context: Annotated[Path, typer.Option(help="JSON Lines of {prompt, score}: what the policy did.")],
    prompts: Annotated[str, typer.Option(help="JSON Lines of {prompt}; - reads standard input.")],
    output: Annotated[Path | None, typer.Option(help="Where the lines go; standard output by default.")] = None,
    reward_range: GivenRange = None,
    checkpoint: Annotated[Path | None, typer.Option(help="V0's adapter; without it the embedded V0 runs.")] = None,
    head: Annotated[Path | None, typer.Option(help="TabPFN's checkpoint; without it kernel regression.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Language model, folder or name, with --checkpoint.")] = None,
    device: Annotated[str, typer.Option(help="Where backbone, adapter and head run; with --checkpoint.")] = "cpu",
    background: Annotated[Path | None, typer.Option(help="Scored records of other policies, embedded V0.")] = None,
    cache: Cache = None,
    cache_gib: CacheSize = 4.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the reliability of scored prompts to this image.")] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Add to each prompt the probability that the policy behind the context succeeds."""
    check_outputs(output, plot)
    ranges = reward_range or DEFAULT_RANGE
    others = read_background(background, ranges)
    console = Console(stderr=output is None)
    model = make_model(checkpoint, head, backbone, device, cache, cache_gib, others, ranges)
    with reading(prompts, "predict") as on_bytes:
        summary = predict_file(model, context, prompts, output, ranges, skip_bad, on_bytes)
    console.print(prediction_table(summary, skip_bad))
    warn_of_range(reward_range, summary.zero_or_one)
    if summary.bad_lines:
        console.print(f"bad lines: {bad_path(prompts, output).parent}/*.bad.jsonl", soft_wrap=True)
    if output is not None:
        console.print(f"predictions: {output}", soft_wrap=True)
    if plot is not None:
        draw(summary, plot, console)


def read_background(file: Path | None, reward_range: tuple[float, float]) -> list[Record]:
    """Return the scored records of other policies, one record a policy."""
    if file is None:
        return []
    from v05.scored import read_records

    return list(read_records(file, None, *reward_range).values())


def draw(summary: Prediction, plot: Path, console: Console) -> None:
    """Draw the reliability plot, or say why there is none."""
    from v05.plots.reliability import plot_reliability

    if not summary.rate:
        raise InputError(f"--plot {plot}: no prompt outside the context has a score; allowed: one or more")
    with drawing(plot):
        plot_reliability({"V0": summary.reliability}, f"{len(summary.rate):,} prompts, AUC {summary.auc:.3f}", plot)
    console.print(f"plot: {plot}", soft_wrap=True)
