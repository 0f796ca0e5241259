"""`v05 train`: one run, or a comparison of several, with progress and a summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from v05.cli.progress import ProgressReporter, reporting
from v05.errors import InputError
from v05.estimates import binomial_interval
from v05.stop import Interrupted, StopRequest
from v05.training.compare import compare as compare_algorithms
from v05.training.compare import reference_of
from v05.training.config import PRIORS, TrainConfig
from v05.training.loss_config import PLAIN
from v05.training.model_config import ModelConfig
from v05.training.ranks import Ranks, join_ranks, leave_ranks
from v05.training.run import train_run
from v05.training.run_folder import remove_run
from v05.training.settings import Settings, make_settings
from v05.training.stream_config import StreamConfig


def train(
    output: Annotated[Path, typer.Option(help="Folder of the run; made where missing.")] = Path("runs/train"),
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Name[:k], k rollouts to start with: v05_from_one, v05, grpo, rloo, spo, ...",
            show_default=str(TrainConfig.algorithm),
        ),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Algorithms to run beside it, such as grpo:16,dr_grpo:4.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of a comparison, such as 0,1,2; by default --seed.")] = None,
    rollouts: Annotated[
        int | None, typer.Option(help="Rollouts to spend.", show_default=str(TrainConfig.rollouts))
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of Adam; 1e-6 with --model.", show_default=str(TrainConfig.learning_rate))
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRIORS)}.", show_default=str(TrainConfig.prior))
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a language model of yours.")] = None,
    data: Annotated[str | None, typer.Option(help="With --model: .jsonl or .parquet file, or a data set.")] = None,
    verifier: Annotated[
        str | None,
        typer.Option(help="With --model: math, exact, module:function.", show_default=str(ModelConfig.verifier)),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="With --model: hf, vllm, vllm-sync, http://host:port.", show_default=str(ModelConfig.engine)),
    ] = None,
    engine_options: Annotated[
        str | None,
        typer.Option(help="More arguments of vLLM, a JSON object.", show_default=str(ModelConfig.engine_options)),
    ] = None,
    reward_range: Annotated[
        tuple[float, float] | None,
        typer.Option(help="With --model: smallest and largest reward.", show_default="0 1"),
    ] = None,
    template: Annotated[str | None, typer.Option(help="With --model: prompt with {prompt} for the problem.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="With --model: longest answer.", show_default=str(ModelConfig.max_new_tokens))
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --model: bfloat16 or float32.", show_default=str(ModelConfig.dtype))
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="With --model: linear, or logits, which keeps them.", show_default=str(ModelConfig.loss)),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="batch; with a scheduler barrier, async, planned, stream.", show_default=str(StreamConfig.mode)
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="With a scheduler, who gets how many: look-ahead, fixed, utility, variance, ...",
            show_default=str(StreamConfig.rule),
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Updates in flight at most, with --mode stream.", show_default=str(StreamConfig.window)),
    ] = None,
    rollouts_per_update: Annotated[
        int | None,
        typer.Option(help="Rollouts that one step learns from.", show_default=str(TrainConfig.rollouts_per_update)),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            help="Parts of a batch in memory one after the other.", show_default=str(TrainConfig.micro_batches)
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Fixes the order of prompts and every sample.", show_default=str(TrainConfig.seed)),
    ] = None,
    heldout_seed: Annotated[
        int | None, typer.Option(help="Chooses the held-out prompts.", show_default=str(TrainConfig.heldout_seed))
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML or JSON file of settings; options override it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over; a finished warm start is kept.")] = False,
    threads: Annotated[int, typer.Option(help="Processor threads; the bits depend on it.")] = 1,
) -> None:
    """Train a small policy, or a model of yours on your data, by reinforcement learning; or compare algorithms."""
    given: dict[str, Any] = {"algorithm": algorithm, "rollouts": rollouts, "prior": prior, "seed": seed}
    given |= {"learning_rate": learning_rate, "rollouts_per_update": rollouts_per_update}
    given |= {"micro_batches": micro_batches, "heldout_seed": heldout_seed}
    own: dict[str, Any] = {"model": model, "data": data, "verifier": verifier, "engine": engine, "template": template}
    own |= {"engine_options": engine_options, "max_new_tokens": max_new_tokens, "dtype": dtype, "loss": loss}
    own |= dict(zip(("reward_low", "reward_high"), reward_range or (None, None), strict=True))
    sampling = _given({"mode": mode, "rule": rule, "window": window})
    if resume and overwrite:
        raise InputError("--resume and --overwrite are both given; allowed: one of them")
    if resume and compare is None and (config, algorithm, model) == (None, None, None):
        _check_run(output)
    settings = make_settings(config, output, resume, _given(given), _given(own), sampling)
    if compare is not None:
        _check_comparison(settings)
    elif seeds is not None:
        raise InputError("--seeds is given without --compare; allowed: both, or --seed")
    _set_threads(threads)

    def work(stop: StopRequest, reporter: ProgressReporter, ranks: Ranks) -> Table:
        if compare is None:
            return _one(settings, output, stop, reporter, resume, overwrite, ranks)
        return _several(settings.config, compare, seeds, output, stop, reporter, overwrite, ranks)

    again = f"v05 train --output {output} --resume" if compare is None else "run the same command again"
    _carry_out(work, output, again)


def _carry_out(work: Callable[[StopRequest, ProgressReporter, Ranks], Table], output: Path, again: str) -> None:
    """Work, with progress on the screen, as one of torchrun's processes where it started some; print what came of it.

    Args:
        work: returns what to print.
        output: folder that it writes to.
        again: how to go on after a stop.
    """
    ranks = join_ranks()
    console = Console(quiet=not ranks.leads)
    try:
        with StopRequest() as stop, reporting(console) as reporter:
            table = work(stop, reporter, ranks)
    except Interrupted as interrupted:
        console.print(f"Stopped: {interrupted}. To go on: {again}", soft_wrap=True, highlight=False)
        raise typer.Exit(130) from interrupted
    finally:
        leave_ranks()
    console.print(table)
    console.print(f"files: {output}", soft_wrap=True, highlight=False)


def _check_run(output: Path) -> None:
    """Raise InputError where there is no run that its own settings would go on with."""
    if not (output / "config.json").exists():
        settings = "--config, --algorithm or --model, which start one"
        raise InputError(f"{output} has no run; allowed with --resume alone: the folder of one; or with {settings}")


def _check_comparison(settings: Settings) -> None:
    """Raise InputError for what goes with one run alone."""
    if settings.stream.streams:
        raise InputError(f"--mode is {settings.stream.mode} with --compare; allowed there: batch")
    if settings.loss != PLAIN:
        raise InputError("[loss] is given with --compare; allowed: one of them")
    if settings.model is not None:
        raise InputError("--compare is given with --model; allowed: one of them")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise InputError(f"--threads is {threads}; allowed: 1 or more")
    torch.set_num_threads(threads)


def _one(
    settings: Settings,
    output: Path,
    stop: StopRequest,
    reporter: ProgressReporter,
    resume: bool,
    overwrite: bool,
    ranks: Ranks,
) -> Table:
    """Train once; return what to print."""
    if overwrite and ranks.leads:
        remove_run(output)
    options: dict[str, Any] = {"model": settings.model, "stream": settings.stream, "loss": settings.loss}
    options |= {"resume": resume, "changes": True, "ranks": ranks}
    summary = train_run(settings.config, output, output / "warm_start", stop, reporter, **options)
    table = Table(title=f"{summary['algorithm']}, seed {summary['seed']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    answered = {when: summary[f"heldout_{when}"] for when in ("before", "after")}
    worths = summary.get("heldout_worth", [total for _, total in answered.values()])  # an older run has none
    for (when, (right, total)), worth in zip(answered.items(), worths, strict=True):
        low, high = binomial_interval(worth * right / total, worth)
        table.add_row(f"held-out accuracy {when}", f"{right / total:.1%}   95 % interval {low:.1%} to {high:.1%}")
    answers = settings.config.heldout_samples
    samples = f"{summary['heldout_after'][1] // answers:,} prompts, {answers} answers each, temperature 1"
    table.add_row("held out", samples)
    table.add_row("rollouts spent", f"{summary['rollouts']:,}")
    if summary["dropped"]:
        table.add_row("of these dropped", f"{summary['dropped']:,}")
    failures, timeouts = summary.get("reward_failures", 0), summary.get("reward_timeouts", 0)
    if failures or timeouts:
        table.add_row("answers without a reward", f"{failures:,} failures, {timeouts:,} timeouts of the verifier")
    if summary["conflicts"] is not None:
        table.add_row("conflicts found", f"{summary['conflicts']:,} in {summary['prompts']:,} prompts")
    table.add_row("mean rollouts per prompt", f"{summary['rollouts_per_prompt']:.2f}")
    table.add_row("seconds" if settings.model else "seconds after the warm start", f"{summary['seconds']:.0f}")
    table.add_row("written", "metrics.jsonl, curves.png, summary.json, checkpoints, policy")
    return table


def _several(
    settings: TrainConfig,
    names: str,
    seeds: str | None,
    output: Path,
    stop: StopRequest,
    reporter: ProgressReporter,
    overwrite: bool,
    ranks: Ranks,
) -> Table:
    """Compare; return what to print."""
    if ranks.count > 1:
        raise InputError(f"{ranks.count} processes are given; allowed with --compare: 1")
    algorithms = [settings.algorithm, *(name.strip() for name in names.split(",") if name.strip())]
    chosen = [settings.seed] if seeds is None else _whole_numbers(seeds)
    if overwrite:
        for run in sorted((output / "runs").glob("*-seed*")):
            remove_run(run)
    curves = compare_algorithms(settings, algorithms, chosen, output, stop, reporter)
    target = reference_of(curves)
    table = Table(title=f"Held-out accuracy, mean of {len(chosen)} seeds", title_justify="left")
    table.add_column("rollouts", justify="right")
    for curve in curves:
        table.add_column(curve.name, justify="right")
    points = len(target.rollouts)
    for point in sorted({round(step * (points - 1) / min(8, points - 1)) for step in range(min(8, points - 1) + 1)}):
        table.add_row(f"{target.rollouts[point]:,}", *(f"{curve.accuracy[:, point].mean():.1%}" for curve in curves))
    table.add_section()
    needed = [curve.rollouts_to(target.final) for curve in curves]
    table.add_row(f"to {target.final:.1%}", *("never" if count is None else f"{count:,.0f}" for count in needed))
    table.caption = f"last row: rollouts to {target.name}'s end"
    return table


def _whole_numbers(text: str) -> list[int]:
    """Return the numbers in a comma-separated list."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"--seeds is {text!r}; allowed: whole numbers separated by commas")
    return [int(part) for part in parts]
