"""`v05 fuse`: rollout records to decisions, with a progress bar, a summary table and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from v05.cli.options import GivenRange, SkipBad
from v05.cli.outputs import DEFAULT_RANGE, check_outputs, drawing, table_of_facts, warn_of_range
from v05.cli.progress import reading
from v05.errors import InputError
from v05.fuse import FuseConfig, Summary, fuse_file
from v05.kernels.advantage.estimators import SCALES
from v05.records import bad_path


def summary_table(summary: Summary, config: FuseConfig) -> Table:
    """Return a table of what was decided, for the terminal."""
    table = table_of_facts("V0.5 fusion")
    share = summary.per_group
    ceiling = summary.groups * config.k_max
    spent = f" ({summary.planned / ceiling:.0%} of {config.k_max} each)" if ceiling else ""
    rows = [
        ("prompts", f"{summary.groups:,}"),
        ("rollouts read", f"{summary.rollouts:,}"),
        ("mean prior", f"{share(summary.prior_sum):.4f}"),
        ("mean reward of a prompt", f"{summary.mean_sum / max(summary.groups_with_rollouts, 1):.4f}"),
        ("mean baseline", f"{share(summary.baseline_sum):.4f}"),
        ("mean trust in the rollouts (w)", f"{share(summary.weight_sum):.4f}"),
        ("conflicts", f"{summary.conflicts:,} ({share(summary.conflicts):.1%})"),
        ("mean estimated error (MSE)", f"{share(summary.mse_sum):.5f}"),
        ("prompts that roll out more", f"{summary.undecided:,} ({share(summary.undecided):.1%})"),
        ("rollouts planned", f"{summary.planned:,}{spent}"),
        ("planned per prompt", f"{share(summary.planned):.2f}"),
    ]
    if config.skip_bad:
        rows.append(("bad lines set aside", f"{summary.bad_lines:,}"))
    for row in rows:
        table.add_row(*row)
    return table


def fuse(
    records: Annotated[str, typer.Argument(help="JSON Lines of {prompt, rewards, prior}; - reads standard input.")],
    output: Annotated[Path | None, typer.Option(help="Where the decisions go; standard output by default.")] = None,
    reward_range: GivenRange = None,
    cost: Annotated[float, typer.Option(help="Cost of a rollout, in units of the largest variance.")] = 1 / 256,
    k_init: Annotated[int, typer.Option(help="Rollouts before the first test.")] = 4,
    k_max: Annotated[int, typer.Option(help="Rollouts at most.")] = 16,
    scale: Annotated[str, typer.Option(help=f"Scale of the advantages: {', '.join(SCALES)}.")] = "none",
    fusion: Annotated[
        str, typer.Option(help="v05, or calibrated: learn from all lines how far the priors can be trusted.")
    ] = "v05",
    plot: Annotated[Path | None, typer.Option(help="Draw prior against observed mean to this image.")] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Turn rollout records into baselines, conflicts, plans and advantages, a line for a line."""
    if scale not in SCALES:
        raise InputError(f"--scale is {scale!r}; allowed: {', '.join(SCALES)}")
    config = FuseConfig(reward_range or DEFAULT_RANGE, cost, k_init, k_max, scale, skip_bad, fusion)
    check_outputs(output, plot)
    console = Console(stderr=output is None)
    with reading(records, "fuse") as on_bytes:
        summary = fuse_file(records, output, config, on_bytes)
    console.print(summary_table(summary, config))
    warn_of_range(reward_range, summary.zero_or_one)
    if summary.bad_lines:
        console.print(f"bad lines: {bad_path(records, output)}", soft_wrap=True)
    if output is not None:
        console.print(f"decisions: {output}", soft_wrap=True)
    if plot is not None:
        from v05.plots.fusion import plot_fusion

        with drawing(plot):
            plot_fusion(summary, config, plot)
        console.print(f"plot: {plot}", soft_wrap=True)
