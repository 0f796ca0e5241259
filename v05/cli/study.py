"""`v05 study`: `prior`, a prior judged on prompts it never saw, beside what it has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from v05.cli import study_baselines, study_train
from v05.cli.models import cache_file, cache_limit
from v05.cli.options import Cache, CacheSize, Limit, Numbers, RewardRange, Texts
from v05.cli.outputs import check_outputs, drawing, write_numbers
from v05.cli.progress import batches, progressing
from v05.files import finite
from v05.records import check_range
from v05.scored import read_scored
from v05.studies.prior import EMBEDDED, Scores, cross_predict, mean_of_known, outcomes_of, predictors_of
from v05.value.measure import reliability

app = typer.Typer(
    help="Studies: what was measured, reproducible on your records.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _root() -> None:
    pass


app.command()(study_baselines.records)
app.command()(study_baselines.gradient)
app.command()(study_train.train)


@app.command()
def prior(
    records: Annotated[Path, typer.Option(help="JSON Lines of scored prompts; docs/commands.md has the format.")],
    prompts: Texts = None,
    reward_range: RewardRange = (-1.0, 1.0),
    folds: Annotated[int, typer.Option(help="Folds over prompts.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the folds.")] = 0,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap over prompts.")] = 1000,
    alone: Annotated[bool, typer.Option(help="Judge V0 also with one policy's records only.")] = True,
    limit: Limit = None,
    cache: Cache = None,
    cache_gib: CacheSize = 4.0,
    output: Numbers = None,
    plot: Annotated[Path | None, typer.Option(help="Draw reliability curves to this image.")] = None,
) -> None:
    """Judge the embedded V0 on prompts that nothing was trained on, beside the context's mean and ridge regressions."""
    from v05.value.embedder import CachedEmbedder, sentence_embedder
    from v05.value.model import V0, EmbeddingCache

    check_outputs(output, plot)
    low, high = reward_range
    check_range(low, high)
    found = read_scored(records, prompts, low, high)[:limit]
    data = outcomes_of(found, reward_range, folds, seed)
    console = Console()
    embedder = CachedEmbedder(sentence_embedder(), EmbeddingCache(cache_file(cache), cache_limit(cache_gib)))
    with progressing() as progress:
        model = V0.embedded(embedder=embedder)
        for part in batches(data.prompts, 64, "embed prompts", progress):
            model.describe(part)
        vectors = dict(zip(data.prompts, sentences(embedder, data.prompts), strict=True))

        def embed(texts: Sequence[str]) -> np.ndarray:
            return np.stack([vectors[text] for text in texts]) if texts else np.zeros((0, embedder.width // 2))

        models = predictors_of(model, embed, alone)
        task = progress.add_task("folds", total=folds * len(models))
        on_fold = lambda done, name: progress.update(task, completed=done, description=name)  # noqa: E731
        scores = Scores(data, cross_predict(data, models, on_fold), high - low)
    report = summarise(scores, resamples)
    show(report, scores, console)
    if output is not None:
        write_numbers(output, finite(report))
        console.print(f"numbers: {output}", soft_wrap=True)
    if plot is not None:
        draw(scores, plot, console)


def sentences(embedder: Any, prompts: Sequence[str]) -> np.ndarray:
    """Return the sentence vectors of prompts, without the wording beside them."""
    vectors: np.ndarray = embedder.embed(prompts).last.chunk(2, dim=-1)[1].numpy()
    return vectors


def summarise(scores: Scores, resamples: int) -> dict[str, Any]:
    """Return all numbers of the study by model."""
    draws = scores.bootstrap(resamples) if resamples else {}
    report: dict[str, Any] = {"policies": scores.data.policies, "models": {}}
    for name, prediction in scores.predictions.items():
        aucs, errors = scores.of(name)
        with_mean, with_difficulty = scores.residual_correlations(name)
        curve = reliability(prediction, scores.data.rate)
        entry: dict[str, Any] = {
            "auc": mean_of_known(aucs),
            "squared_error": float(errors.mean()),
            "auc_by_policy": aucs.tolist(),
            "squared_error_by_policy": errors.tolist(),
            "residual_correlation_with_context_mean": with_mean,
            "residual_correlation_with_difficulty": with_difficulty,
            "calibration_gap": curve.gap,
            "reliability": {"predicted": curve.predicted.tolist(), "observed": curve.observed.tolist()},
        }
        if draws:
            edges, behind = interval_of(draws[name]), interval_of(draws[EMBEDDED] - draws[name])
            entry |= {"auc_interval": edges[:, 0].tolist(), "squared_error_interval": edges[:, 1].tolist()}
            entry |= {"v0_minus_auc": behind[:, 0].tolist(), "v0_minus_squared_error": behind[:, 1].tolist()}
        report["models"][name] = entry
    return report


def interval_of(draws: np.ndarray) -> np.ndarray:
    """Return the 95 % interval of each column of draws, [2, columns], leaving out what is nan in a draw."""
    known = (column[~np.isnan(column)] for column in draws.T)
    none = np.full(2, np.nan)
    return np.stack([np.quantile(part, [0.025, 0.975]) if len(part) else none for part in known], axis=1)


def show(report: dict[str, Any], scores: Scores, console: Console) -> None:
    """Print the tables of the study."""
    data = scores.data
    title = f"{len(data.rate):,} records, {len(data.prompts):,} prompts, {data.fold.max() + 1} folds over prompts"
    table = Table(title=title, title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("AUC, 95 %", "squared error, 95 %"):
        table.add_column(column, justify="right")
    for name, entry in report["models"].items():
        table.add_row(
            name,
            f"{entry['auc']:.3f}{interval(entry.get('auc_interval'))}",
            f"{entry['squared_error']:.3f}{interval(entry.get('squared_error_interval'))}",
        )
    console.print(table)
    table = Table(title="Calibration", title_justify="left")
    for column in ("model", "gap", "r, context mean", "r, difficulty"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, entry in report["models"].items():
        correlations = [entry[f"residual_correlation_with_{with_}"] for with_ in ("context_mean", "difficulty")]
        table.add_row(name, f"{entry['calibration_gap']:.3f}", *(f"{value:.2f}" for value in correlations))
    table.caption = "gap: mean distance of the reliability curve from the diagonal; r: correlation of residuals"
    console.print(table)
    for label, key in (("AUC", "auc_by_policy"), ("Squared error", "squared_error_by_policy")):
        table = Table(title=f"{label} by policy", title_justify="left")
        table.add_column("model", no_wrap=True)
        for number in range(len(report["policies"])):
            table.add_column(str(number + 1), justify="right")
        for name, entry in report["models"].items():
            table.add_row(name, *(f"{value:.3f}" for value in entry[key]))
        console.print(table)
    for number, policy in enumerate(report["policies"], 1):
        console.print(f"{number}: {policy or 'the only policy'}", highlight=False)


def interval(edges: Sequence[float] | None) -> str:
    """Return an interval to stand behind its number."""
    return "" if edges is None else f" ({edges[0]:.3f} to {edges[1]:.3f})"


def draw(scores: Scores, plot: Path, console: Console) -> None:
    """Draw the reliability curves of V0 and of the strongest rival."""
    from v05.plots.reliability import plot_reliability

    shown = [name for name in (EMBEDDED, "the same, pooled") if name in scores.predictions]
    labels = {EMBEDDED: EMBEDDED, "the same, pooled": "pooled ridge"}
    curves = {labels[name]: reliability(scores.predictions[name], scores.data.rate) for name in shown}
    with drawing(plot):
        plot_reliability(curves, f"{len(scores.data.rate):,} records, prompts unseen", plot)
    console.print(f"plot: {plot}", soft_wrap=True)
