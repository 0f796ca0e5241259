"""`v05 study train`: algorithms compared by what they reach for the same rollouts, each at its best learning rate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from v05.cli.options import listed
from v05.cli.progress import progressing
from v05.errors import InputError
from v05.plots.training import plot_training
from v05.results_folder import ResultsFolder
from v05.stop import Interrupted, StopRequest
from v05.studies.training import (
    RATES,
    TrainStudy,
    best_rates,
    carry_out,
    choose_rates,
    final_runs,
    trained_of,
    tuning_runs,
)
from v05.studies.training_report import Trained, table_of, target
from v05.training.config import TrainConfig

PAPER = "v05,grpo:16,dapo:16,grpo:4,dr_grpo:16,dr_grpo:4"
FROM_ONE = "v05_calibrated_loo:1,v05_calibrated_loo:2,spo,reinforce"
SWEEP = ",".join(f"{rate:g}" for rate in RATES)


def train(
    output: Annotated[Path, typer.Option(help="Folder of the runs; a stopped study goes on from it.")],
    algorithms: Annotated[
        str, typer.Option(help="With commas between, as `v05 train --algorithm` takes them, without learning rate.")
    ] = f"{PAPER},{FROM_ONE}",
    task: Annotated[str, typer.Option(help="Task of all runs.")] = TrainConfig.task,
    prior: Annotated[str, typer.Option(help="Prior of the algorithms that use one.")] = "history",
    rates: Annotated[str, typer.Option(help="Learning rates of the sweep.")] = SWEEP,
    tuning_seeds: Annotated[int, typer.Option(help="Runs of each in the sweep, on held-out prompts of their own.")] = 2,
    seeds: Annotated[int, typer.Option(help="Runs of each algorithm at its best learning rate.")] = 5,
    rollouts: Annotated[int, typer.Option(help="Of each run.")] = TrainConfig.rollouts,
    per_update: Annotated[int, typer.Option(help="Rollouts that one update learns from.")] = 128,
    heldout: Annotated[int, typer.Option(help="Held-out prompts.")] = TrainConfig.heldout_prompts,
    policy: Annotated[str, typer.Option(help="Size of the policy.")] = TrainConfig.policy,
    warm_start_steps: Annotated[int, typer.Option(help="Of the warm start.")] = TrainConfig.warm_start_steps,
    workers: Annotated[int, typer.Option(help="Runs at once, each on one thread.")] = 1,
) -> None:
    """Tune every algorithm by the same sweep, train it with several seeds, compare accuracy, rollouts and seconds."""
    if workers < 1:
        raise InputError(f"--workers is {workers}; allowed: 1 or more")
    try:
        swept = tuple(float(rate) for rate in listed(rates))
    except ValueError:
        raise InputError(f"--rates is {rates!r}; allowed: numbers with commas between") from None
    every = max(1, rollouts // 16)
    shared = dict(task=task, prior=prior, policy=policy, warm_start_steps=warm_start_steps, heldout_prompts=heldout)
    config = TrainConfig(rollouts=rollouts, rollouts_per_update=per_update, eval_every=every, heldout_seed=1, **shared)  # type: ignore[arg-type]
    study = TrainStudy(listed(algorithms), swept, tuning_seeds, seeds, config)
    settings = {**dataclasses.asdict(study), "algorithms": None, "seeds": None}  # more of either may be asked for later
    ResultsFolder(output, settings, ())
    trained, chosen = trained_in(study, output, workers)
    title = (
        f"Held-out accuracy in % on {task}, prior {prior}, after so many rollouts, {per_update} an update: "
        f"interquartile mean of {seeds} seeds, 95 % bootstrap intervals"
    )
    table = table_of(trained, command_of(study, rates), title)
    edge = [name for name, rate in chosen.items() if rate in (min(swept), max(swept)) and len(swept) > 2]
    if edge:
        table.notes.append(f"Best at an end of the sweep ({rates}): {', '.join(edge)}.")
    table.write(output / "table.json")
    plot_training(trained, target(trained), output / "training.png")
    Console().print(table.rich())
    Console().print(f"results: {output}", soft_wrap=True)


def trained_in(study: TrainStudy, output: Path, workers: int) -> tuple[list[Trained], dict[str, float]]:
    """Carry out what is left of a study, with progress; return its final runs and each algorithm's learning rate."""
    try:
        with StopRequest() as stop, progressing() as progress:
            bar = progress.add_task("sweep", total=None)

            def on_done(done: int, total: int) -> None:
                progress.update(bar, completed=done, total=total)

            carry_out(tuning_runs(study), output, workers, stop, on_done)
            chosen = best_rates(choose_rates(study, output))
            bar = progress.add_task("runs", total=None)
            carry_out(final_runs(study, chosen), output, workers, stop, on_done)
    except Interrupted as stopped:
        typer.echo(f"v05: {stopped}; the same command goes on", err=True)
        raise typer.Exit(130) from None
    return trained_of(study, output, chosen), chosen


def command_of(study: TrainStudy, rates: str) -> str:
    """Return the command that repeats a study, with its rates as they were given."""
    config = study.config
    options = {
        "task": config.task,
        "prior": config.prior,
        "algorithms": ",".join(study.algorithms),
        "rates": rates,
        "tuning-seeds": study.tuning_seeds,
        "seeds": study.seeds,
        "rollouts": config.rollouts,
        "per-update": config.rollouts_per_update,
        "heldout": config.heldout_prompts,
    }
    if config.policy != TrainConfig.policy:
        options["policy"] = config.policy
    if config.warm_start_steps != TrainConfig.warm_start_steps:
        options["warm-start-steps"] = config.warm_start_steps
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"v05 study train --output runs/{config.task} {given}"
