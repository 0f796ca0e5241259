"""`v05 study records` and `v05 study gradient`: how good baselines are, in themselves and for the gradient."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from v05.cli.options import RewardRange, StudyFolder, fractions, listed, numbers
from v05.cli.progress import progressing
from v05.errors import InputError
from v05.files import read_tensors, write_tensors
from v05.kernels.advantage.estimators import ESTIMATORS
from v05.plots.baselines import plot_baseline_errors, plot_gradients
from v05.records import check_keys, check_number, check_range, parse_object, read_blocks
from v05.results_folder import ResultsFolder
from v05.stop import StopRequest
from v05.studies.gradient import GradientQuality, Pool, drawn_as, make_pool, quality
from v05.studies.records import DEFAULT, PRIORS, RANGE, Cell, RecordsStudy, cells
from v05.studies.table import StudyTable
from v05.training.config import TrainConfig
from v05.training.run import make_trainer

FIXED = ",".join(ESTIMATORS)
GROWING = "v05:4-16,v05_loo:4-16,v05_calibrated:4-16,v05_calibrated_loo:4-16,v05_calibrated_loo:1-16,rloo:16,grpo:16"


def read_scores(file: Path, reward_range: tuple[float, float]) -> list[float]:
    """Return the `score` of every line of a JSON Lines file, moved to [-1, 1]."""
    low, high = reward_range
    check_range(low, high)

    def parse(text: bytes, low: float, high: float) -> dict[str, Any]:
        record = parse_object(text, "score")
        check_keys(record, ("score",))
        check_number(record["score"], "score", low, high)
        return record

    found = [r["score"] for block in read_blocks(str(file), low, high, parse=parse) for r in block.records]
    if not found:
        raise InputError(f"{file} has no record; allowed: one a line")
    return [2 * (score - low) / (high - low) - 1 for score in found]


def records(
    context: Annotated[Path, typer.Option(help="JSON Lines with a mean reward, `score`, a line.")],
    output: StudyFolder,
    estimators: Annotated[str, typer.Option(help="Of `group_advantage`, with commas between.")] = ",".join(DEFAULT),
    rollouts: Annotated[str, typer.Option(help="Group sizes, with commas between.")] = "2,4,8",
    repeats: Annotated[int, typer.Option(help="Batches drawn for each prior and group size.")] = 200,
    batch: Annotated[int, typer.Option(help="Prompts in a batch.")] = 256,
    recorded: Annotated[int, typer.Option(help="Rollouts behind each score.")] = 10,
    reward_range: RewardRange = (-1.0, 1.0),
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
) -> None:
    """Compare baselines with the truth on rewards redrawn from recorded success rates, under seven kinds of prior."""
    sizes = numbers(rollouts, "--rollouts")
    study = RecordsStudy(listed(estimators), sizes, repeats, batch, recorded, seed)
    scores = read_scores(context, reward_range)
    settings = {**dataclasses.asdict(study), "scores": len(scores), "sum": sum(scores)}
    folder = ResultsFolder(output, settings, ("prior", "rollouts", "estimator"))
    with progressing() as progress:
        task = progress.add_task("priors", total=len(PRIORS) * len(sizes))
        for prior in PRIORS:
            for k in sizes:
                if not all(folder.has(prior=prior, rollouts=k, estimator=name) for name in study.estimators):
                    for cell in cells(scores, study, prior, k):
                        folder.add(cell._asdict())
                progress.advance(task)
    found = [Cell(**row) for row in folder.results.values()]
    table = cells_table(found, study, command_of(study, reward_range))
    table.write(output / "table.json")
    plot_baseline_errors(found, output / "baselines.png")
    Console().print(table.rich())
    Console().print(f"results: {output}", soft_wrap=True)


def command_of(study: RecordsStudy, reward_range: tuple[float, float]) -> str:
    """Return the command that repeats a study of records: its names, its sizes, and what is not as by default."""
    chosen = f"--estimators {','.join(study.estimators)} --rollouts {','.join(map(str, study.rollouts))}"
    for name in ("repeats", "batch", "recorded", "seed"):
        if (value := getattr(study, name)) != getattr(RecordsStudy, name):
            chosen += f" --{name} {value}"
    if reward_range != RANGE:
        chosen += " --reward-range {:g} {:g}".format(*reward_range)
    return f"v05 study records --context context.jsonl --output runs/records {chosen}"


def cells_table(found: list[Cell], study: RecordsStudy, command: str) -> StudyTable:
    """Return a line for each prior and group size; the smallest error has a star."""
    by_key, rows = {cell[:3]: cell for cell in found}, []
    for prior in PRIORS:
        for k in study.rollouts:
            row = [by_key[prior, k, name] for name in study.estimators]
            best = min(cell.error for cell in row)
            texts = [f"{cell.error:.3f} ±{cell.half_width:.3f}{' *' * (cell.error == best)}" for cell in row]
            rows.append([prior, str(k), *texts])
    title = f"Mean squared error of the baseline, {study.repeats} batches of {study.batch} prompts, ±95 %"
    return StudyTable(title, command, ["prior", "k", *study.estimators], rows, ["A star marks the smallest error."])


def gradient(
    output: StudyFolder,
    estimators: Annotated[
        str, typer.Option(help="Of `group_advantage`: name, name:k or name:k-k_max (growing); k is 4 by default.")
    ] = f"{FIXED},{GROWING}",
    priors: Annotated[str, typer.Option(help=f"Of {', '.join(PRIORS)}.")] = "sd 0.1,sd 0.5,constant",
    prompts: Annotated[int, typer.Option(help="Held-out prompts of the task.")] = 32,
    pool: Annotated[int, typer.Option(help="Rollouts of each that stand for the policy.")] = 4096,
    repeats: Annotated[int, typer.Option(help="Groups drawn of every prompt.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the groups.")] = 0,
    task: Annotated[str, typer.Option(help="Task whose warm start is the policy.")] = TrainConfig.task,
    cost: Annotated[
        str, typer.Option(help="Of a rollout, over the largest variance; growing groups at each.")
    ] = "1/256",
) -> None:
    """Compare gradients from a few rollouts with the gradient of a large pool of them, at the policy's warm start."""
    asked = [
        drawn
        for prior in listed(priors)
        for name in listed(estimators)
        for place, price in enumerate(fractions(cost))
        if (drawn := drawn_as(name, prior, repeats, seed, price)).k_max > drawn.k_init or place == 0
    ]
    if prompts < 1 or pool < 2:
        raise InputError(f"--prompts is {prompts} and --pool {pool}; allowed: 1 and 2 or more")
    settings = dict(task=task, prompts=prompts, pool=pool, repeats=repeats, seed=seed)
    settings["measured"] = ",".join(GradientQuality._fields)
    folder = ResultsFolder(output, settings, ("estimator", "prior", "k_init", "k_max", "cost"))
    with progressing() as progress:
        sampled = read_pool(output, task, prompts, pool, progress)
        bar = progress.add_task("estimators", total=len(asked))
        for drawn in asked:
            if not folder.has(**dataclasses.asdict(drawn)):
                folder.add(quality(sampled, drawn)._asdict())
            progress.advance(bar)
    found = [GradientQuality(**row) for row in folder.results.values()]
    sizes = f"--prompts {prompts} --pool {pool} --repeats {repeats} --cost {','.join(listed(cost))}"
    sizes += f" --seed {seed}" if seed else ""
    chosen = f'--priors "{priors}" --estimators {",".join(listed(estimators))}'
    command = f"v05 study gradient --output runs/gradient --task {task} {chosen} {sizes}"
    table = gradients_table(found, f"Gradients on {task} relative to the truth, ±95 %", command)
    table.write(output / "table.json")
    plot_gradients(found, output / "gradients.png")
    Console().print(table.rich())
    Console().print(f"results: {output}", soft_wrap=True)


def read_pool(output: Path, name: str, prompts: int, size: int, progress: Progress) -> Pool:
    """Return the pool in a folder, made where it is not there yet."""
    file = output / "pool.safetensors"
    if file.exists() and (found := read_tensors(file)).keys() == set(Pool._fields):
        return Pool(**found)
    warm = progress.add_task("warm start", total=None)
    trainer = make_trainer(
        TrainConfig(algorithm="rloo:4", task=name),
        output / "warm_start",
        StopRequest(),
        lambda what, done, total, note: progress.update(warm, description=what, completed=done, total=total),
    )
    progress.remove_task(warm)
    task = progress.add_task("pool", total=prompts)
    texts = trainer.task.prompts(0, 0, prompts, "heldout")
    made = make_pool(
        trainer.policy, trainer.task, trainer.engine, texts, size, lambda done: progress.update(task, completed=done)
    )
    write_tensors(file, made._asdict())
    return made


def gradients_table(found: list[GradientQuality], title: str, command: str) -> StudyTable:
    """Return a line for each estimator, prior by prior."""
    columns = ["estimator", "prior", "k", "rollouts", "factor", "bias^2", "variance", "x rollouts", "with prompts"]
    rows = [
        [
            row.estimator,
            row.prior,
            row.size,
            f"{row.rollouts:.2f}",
            f"{row.factor:.3f}",
            f"{row.bias:.4f} ±{row.bias_half_width:.4f}",
            f"{row.variance:.3f} ±{row.variance_half_width:.3f}",
            f"{row.by_rollout:.2f}",
            f"{row.by_rollout_in_all:.2f}",
        ]
        for prior in dict.fromkeys(row.prior for row in found)
        for row in found
        if row.prior == prior
    ]
    note = (
        "x rollouts: variance times rollouts of a prompt. With prompts: that of the gradient over all prompts: an "
        "update of as many rollouts sees fewer where each has more."
    )
    return StudyTable(title, command, columns, rows, [note])
