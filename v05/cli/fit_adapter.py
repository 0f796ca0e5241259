"""`v05 fit-adapter`: trains V0's query adapter on scored records, with progress, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from v05.cli.models import cache_file, cache_limit
from v05.cli.options import CacheSize, Limit, RewardRange, Texts
from v05.cli.outputs import table_of_facts
from v05.cli.progress import batches, noting
from v05.errors import InputError
from v05.fingerprint import fingerprint
from v05.records import check_range
from v05.scored import by_policy, read_scored
from v05.studies.prior import outcomes_of

MEASURES = (
    ("auc", "AUC within a policy"),
    ("gauc", "AUC over policies of one step"),
    ("pair_accuracy", "pairs in strict order"),
    ("squared_error", "squared error of the success rate"),
    ("residual_correlation_with_context_mean", "residuals with the context's mean, r"),
    ("residual_correlation_with_difficulty", "residuals with the prompt's difficulty, r"),
)


def fit_adapter(
    records: Annotated[Path, typer.Option(help="JSON Lines of scored prompts of several policies.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; made where missing.")],
    prompts: Texts = None,
    reward_range: RewardRange = (-1.0, 1.0),
    steps: Annotated[int, typer.Option(help="Of the optimiser.")] = 400,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after the warm-up.")] = 2e-4,
    context: Annotated[int, typer.Option(help="Outcomes in a context.")] = 128,
    pairs: Annotated[int, typer.Option(help="Of solved and failed prompts in a step.")] = 16,
    queries: Annotated[int, typer.Option(help="Of the adapter.")] = 168,
    seed: Annotated[int, typer.Option(help="Of weights, episodes, dropout and the prompts held out.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations and checkpoints.")] = 100,
    folds: Annotated[int, typer.Option(help="One of so many folds of prompts is held out.")] = 5,
    backbone: Annotated[str | None, typer.Option(help="Folder or name; the packaged model by default.")] = None,
    device: Annotated[str, typer.Option(help="Where the backbone runs.")] = "cpu",
    head: Annotated[Path | None, typer.Option(help="TabPFN's checkpoint; kernel regression without.")] = None,
    cache: Annotated[Path | None, typer.Option(help="File of token states; in the user's cache by default.")] = None,
    cache_gib: CacheSize = 4.0,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
) -> None:
    """Train V0's adapter, which `v05 predict --checkpoint` then uses with the same --backbone."""
    from v05.fit_adapter import FitConfig, Records, check_new
    from v05.fit_adapter import fit_adapter as fit
    from v05.stop import StopRequest
    from v05.value.adapter_training import embedded_head
    from v05.value.tabpfn_head import differentiable_head

    config = FitConfig(steps, learning_rate, context, pairs, queries, seed, eval_every)
    check_new(output, resume)
    low, high = reward_range
    check_range(low, high)
    found = read_scored(records, prompts, low, high)[:limit]
    data = outcomes_of(found, reward_range, folds, seed)
    function = embedded_head() if head is None else differentiable_head(head)
    console = Console()
    with StopRequest() as stop, noting(TimeElapsedColumn(), Console(stderr=True)) as progress:
        embedder = make_embedder(backbone, device, cache, cache_gib)
        states = embed_all(embedder, data.prompts, stop, progress)
        aged = [rows[0].step for rows in by_policy(found).values()]
        named = fingerprint(repr(record).encode() for record in found)
        source = f"{embedder.name}/{head.name if head else 'embedded'}/{folds}/{named}/{low:g} {high:g}"
        task = progress.add_task("train", total=steps, note="")
        report = fit(
            config,
            Records(data, states, aged, source),
            function,
            output,
            stop,
            lambda done, note: progress.update(task, completed=done, note=note),
            resume=resume,
        )
    show(report, console)
    if report["step"] < steps:
        console.print(f"Stopped after {report['step']} of {steps} steps; go on with --resume", highlight=False)
        raise typer.Exit(130)
    file = output / "adapter.safetensors"
    console.print(
        f"use it: v05 predict --checkpoint {file} --backbone {source_of(backbone)}", soft_wrap=True, highlight=False
    )


def source_of(backbone: str | None) -> str | Path:
    """Return the folder or name of the backbone: the packaged model where none is given."""
    from v05.value.embedder import sentence_folder

    return sentence_folder() if backbone is None else backbone


def make_embedder(backbone: str | None, device: str, cache: Path | None, cache_gib: float) -> Any:
    """Return the embedder of token states, with its cache."""
    from v05.value.cache import EmbeddingCache
    from v05.value.embedder import CachedEmbedder, TransformersEmbedder

    store = EmbeddingCache(cache_file(cache), cache_limit(cache_gib))
    return CachedEmbedder(TransformersEmbedder.from_pretrained(source_of(backbone), device), store)


def embed_all(embedder: Any, prompts: list[str], stop: Any, progress: Progress) -> list[Any]:
    """Return the token states of every prompt, showing how far it is."""
    rows: list[Any] = []
    for part in batches(prompts, 64, "embed prompts", progress):
        batch = embedder.embed(part)
        rows += batch.states.float().split(batch.offsets.diff().tolist())
        if stop.requested:
            raise InputError("stopped while prompts were embedded; what is done is cached, so run the command again")
    return rows


def show(report: dict[str, Any], console: Console) -> None:
    """Print the metrics on prompts held out."""
    table = table_of_facts("Prompts held out")
    for key, label in MEASURES:
        table.add_row(label, "-" if report[key] is None else f"{report[key]:.4f}")
    console.print(table)
