"""`v05 simulate`: how long dynamic budgets take on a continuous-batching engine, and what they buy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from v05.cli.options import Numbers
from v05.cli.outputs import check_outputs, drawing, write_numbers
from v05.cli.progress import progressing
from v05.errors import InputError
from v05.plots.simulation import plot_simulation
from v05.rollout.simulated import LONGEST, LogNormal, Observed
from v05.simulation import Result, Simulation, compare, contenders


def simulate(
    prompts: Annotated[int, typer.Option(help="Prompts of a step.")] = 512,
    slots: Annotated[int, typer.Option(help="Answers that the engine decodes at once.")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps to learn from; learning takes no time.")] = 8,
    window: Annotated[int, typer.Option(help="Steps in flight at most where rollouts stream.")] = 6,
    prior_sd: Annotated[
        float, typer.Option(help="Standard deviation of the prior's error; rewards are -1 and 1.")
    ] = 0.3,
    lengths: Annotated[
        Path | None, typer.Option(help="File with the length of an answer in tokens a line; lognormal without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, answers and errors.")] = 0,
    output: Numbers = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time and error to this image.")] = None,
) -> None:
    """Drive the real scheduler with a simulated engine: every mode, groups of fixed size, and other budget rules."""
    check_outputs(output, plot)
    drawn = LogNormal() if lengths is None else Observed(read_lengths(lengths))
    try:
        simulation = Simulation(prompts, slots, steps, window, prior_sd, seed, drawn)
    except InputError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from None
    results = []
    with progressing() as progress:
        bar = progress.add_task("contenders", total=contenders())
        for result in compare(simulation):
            results.append(result)
            progress.advance(bar)
    Console().print(table_of(results, simulation))
    if output is not None:
        settings = {**asdict(simulation), "length": "lognormal" if lengths is None else str(lengths)}
        write_numbers(output, {"settings": settings, "results": [result._asdict() for result in results]})
    if plot is not None:
        with drawing(plot):
            plot_simulation(results, plot)


def read_lengths(file: Path) -> tuple[int, ...]:
    """Return the lengths in a text file, one a line."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip().isdecimal() or not 1 <= int(line) <= LONGEST:
            raise InputError(f"{file}:{number} is {line!r}; allowed: a length from 1 to {LONGEST:,}")
        found.append(int(line))
    if not found:
        raise InputError(f"{file} has no line; allowed: a length a line")
    return tuple(found)


def table_of(results: list[Result], simulation: Simulation) -> Table:
    """Return a table with a line for each contender."""
    title = f"{simulation.steps} steps of {simulation.prompts} prompts, {simulation.slots} slots"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.padding = 0
    table.caption = (
        "each: rollouts per prompt. Mtok, ktime: million tokens and thousand decode steps of a step. /ideal: the time "
        "over that of all tokens decoded meanwhile with every slot busy. busy: share of the slots after the first "
        "step. mean, v05, calib: squared error of the group's mean, V0.5's fusion and the calibrated one. "
        "stale: updates that rollouts are behind, mean and largest."
    )
    table.caption_justify = "left"
    table.add_column("rule", no_wrap=True)
    table.add_column("mode", no_wrap=True)
    for column in ("each", "Mtok", "ktime", "/ideal", "busy", "mean", "v05", "calib", "stale"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        errors = (f"{error:.3f}".removeprefix("0") for error in (r.error_mean, r.error_v05, r.error_calibrated))
        numbers = (
            f"{r.rollouts:.2f}",
            f"{r.tokens / 1e6:.1f}",
            f"{r.time / 1e3:.1f}",
            f"{r.over_ideal:.2f}",
            f"{r.busy:.0%}",
        )
        table.add_row(r.name, r.mode, *numbers, *errors, f"{r.stale:.1f} {r.stalest}")
    return table
