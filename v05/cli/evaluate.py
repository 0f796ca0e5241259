"""`v05 evaluate`: mean@n and pass@k of a model at the problems of a file or a data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import TimeRemainingColumn
from rich.table import Table

from v05.checks import check
from v05.cli.options import RewardRange
from v05.cli.progress import counting
from v05.errors import InputError
from v05.estimates import Estimate
from v05.evaluate import Evaluation, Sampling, evaluate
from v05.fingerprint import fingerprint, folder_fingerprint
from v05.records import check_range
from v05.tasks.data import BENCHMARKS, Source, columns_digest, read_data
from v05.tasks.pool import RewardPool
from v05.tasks.verifiers import VERIFIERS, make_verifier, needs_answer
from v05.training.model_config import is_object

PATIENCE: Final = ("timeout", "startup_timeout")  # options of a server that change nothing but what is waited for


def source_of(data: str, given: dict[str, str | None]) -> Source:
    """Return the benchmark of that name, or the file or data set, with the columns and the template given."""
    source = BENCHMARKS.get(data, Source(data))
    return replace(source, **{name: value for name, value in given.items() if value is not None})


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """Return a table of what was found, for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column()
    table.add_column("mean", justify="right")
    table.add_column("95 % over problems", justify="right")

    def row(name: str, estimate: Estimate, percent: bool = True) -> None:
        form = "{:.1%}" if percent else "{:.3f}"
        bounds = "-" if estimate.low != estimate.low else " to ".join(map(form.format, estimate[1:]))
        table.add_row(name, form.format(estimate.value), bounds)

    row(f"mean@{evaluation.samples} (reward)", evaluation.mean, percent=False)
    for k, estimate in evaluation.passed.items():
        row(f"pass@{k}", estimate)
    table.add_section()
    table.add_row("problems", f"{evaluation.problems:,}", "")
    table.add_row("tokens an answer", f"{evaluation.tokens:,.0f}", "")
    table.add_row("cut off, hence wrong", f"{evaluation.unfinished:.1%}", "")
    if evaluation.failures or evaluation.timeouts:
        table.add_row("verifier failed", f"{evaluation.failures:,}", "")
        table.add_row("verifier timed out", f"{evaluation.timeouts:,}", "")
    return table


def run(
    model: str,
    source: Source,
    output: Path,
    sampling: Sampling,
    judging: dict[str, Any],
    dtype: str,
    device: str,
    engine: str,
    options: dict[str, Any],
    console: Console,
) -> Evaluation:
    """Evaluate with a progress bar; a stop is said in one line, with exit status 130."""
    from v05.stop import Interrupted, StopRequest
    from v05.training.engines import check_engine, close_engine, make_engine
    from v05.training.pretrained import load_policy
    from v05.training.user_model import check_positions, prompt_lengths

    check_engine(engine)
    verifier = make_verifier(judging["verifier"], judging["reward_range"])
    records = read_data(source, needs_answer(verifier))
    # Other engines load the model themselves, and want the device's memory.
    policy = load_policy(model, dtype=dtype, device=device if engine == "hf" else "cpu")
    longest = max(prompt_lengths(policy, records, source.place))
    check_positions(policy, longest, sampling.max_new_tokens)
    weights = folder_fingerprint(Path(model)) or model
    settings: dict[str, Any] = {"model": model, "weights": weights, "engine": engine, "dtype": dtype}
    settings |= {"data": source.place, "verifier": judging["verifier"]}
    place = judging["verifier"].rpartition(":")[0]
    if place.endswith(".py"):
        settings["verifier_text"] = fingerprint([Path(place).read_bytes()])
    if judging["verifier"] not in VERIFIERS:
        settings["columns"] = columns_digest(records)
    if lasting := {name: value for name, value in options.items() if name not in PATIENCE}:
        settings["engine_options"] = lasting
    display = counting(TimeRemainingColumn(), console=console)
    with RewardPool(**judging) as pool, StopRequest() as stop, display as progress:
        bar = progress.add_task("problems", total=len(records))

        def on_problems(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        longest += sampling.max_new_tokens
        sampler = make_engine(engine, policy, model=model, dtype=dtype, longest=longest, options=options)
        try:
            return evaluate(sampler, records, pool, sampling, output, settings, stop, on_problems)
        except Interrupted as stopped:
            progress.stop()
            console.print(f"Stopped: {stopped}. To go on: run the same command again", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from stopped
        finally:
            close_engine(sampler)


def evaluate_command(
    model: Annotated[str, typer.Option(help="Folder or hub name of a causal language model.")],
    data: Annotated[str, typer.Option(help=f"{', '.join(BENCHMARKS)}; a .jsonl or .parquet file; a data set's name.")],
    output: Annotated[Path, typer.Option(help="Folder of the results; run again to go on with it.")],
    samples: Annotated[int, typer.Option(help="Answers to each problem, the n of mean@n.")] = 16,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer; one cut off there is wrong.")] = 4096,
    verifier: Annotated[str, typer.Option(help="math, exact, package.module:function or file.py:function.")] = "math",
    reward_range: RewardRange = (0.0, 1.0),
    engine: Annotated[str, typer.Option(help="What generates: hf, vllm, vllm-sync, http://host:port.")] = "hf",
    engine_options: Annotated[str, typer.Option(help="More arguments of vLLM, a JSON object.")] = "{}",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="Of the engine hf: auto, cpu, cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Fixes the samples.")] = 0,
    batch: Annotated[int, typer.Option(help="Problems generated at once.")] = 8,
    split: Annotated[str | None, typer.Option(help="Of a data set.")] = None,
    prompt_key: Annotated[str | None, typer.Option(help="Column of the problem.")] = None,
    answer_key: Annotated[str | None, typer.Option(help="Column of the answer.")] = None,
    template: Annotated[str | None, typer.Option(help="Prompt, with {prompt} for the problem.")] = None,
    reward_workers: Annotated[int, typer.Option(help="Processes that judge answers.")] = 2,
    reward_timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 10.0,
) -> None:
    """Sample a model's answers to problems and report mean@n and pass@k."""
    from v05.plots.evaluation import plot_evaluation

    if reward_workers < 1 or not 0 < reward_timeout < float("inf"):
        raise InputError(f"{reward_workers} workers and {reward_timeout:g} s; allowed: 1 or more, above 0 and finite")
    check_range(*reward_range)
    check("engine_options", engine_options, is_object, "a JSON object")
    named = {"split": split, "prompt_key": prompt_key, "answer_key": answer_key, "template": template}
    source, sampling = source_of(data, named), Sampling(samples, temperature, max_new_tokens, seed, batch)
    judging = dict(verifier=verifier, reward_range=reward_range, workers=reward_workers, timeout=reward_timeout)
    console = Console()
    found = run(model, source, output, sampling, judging, dtype, device, engine, json.loads(engine_options), console)
    title = f"{Path(model).name} at {data}"
    plot_evaluation(found, f"{title}: {found.problems} problems, {samples} answers each", output / "pass_at_k.png")
    console.print(evaluation_table(found, title))
    console.print(f"files: {output}", soft_wrap=True, highlight=False)
