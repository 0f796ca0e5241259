"""metrics.jsonl, one line an update, and times.jsonl, one an evaluation."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from v05.batch import Groups
from v05.files import write_text


def read_metrics(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, or of times.jsonl: the updates' processor seconds at each evaluation."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def truncate_metrics(file: Path, update: int) -> None:
    """Remove the lines of later updates than `update`, and a line that was cut off in writing."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["update"] > update:
            break
        kept.append(line)
    write_text(file, "".join(kept))


def accuracies(metrics: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return rollouts spent and held-out accuracy at each evaluation."""
    evaluated = [line for line in metrics if line.get("heldout_right") is not None]
    return (
        [line["rollouts"] for line in evaluated],
        [line["heldout_right"] / line["heldout_total"] for line in evaluated],
    )


def worth(line: Mapping[str, Any]) -> float:
    """Return how many independent answers an evaluation's are worth; all of them where an older run did not note it."""
    return float(line.get("heldout_worth", line["heldout_total"]))


def total_of(metrics: Sequence[Mapping[str, Any]], *names: str) -> int:
    """Return the sum of counts over all lines; a line, or an older run, may lack them."""
    return sum(line.get(name, 0) for line in metrics for name in names)


def means_of(groups: Groups, prior: Tensor | None, advantages: Tensor) -> dict[str, float]:
    """Return what an update's groups come to in the mean; nan where they are none, or no prior is asked.

    Args:
        groups: G groups with N rollouts in all.
        prior: expected rewards [G] float32, or None.
        advantages: [N] float32.
    """
    off = math.nan if prior is None else float((prior - groups.means).square().mean())
    return {
        "reward": float(groups.rewards.mean()),
        "rollouts_per_prompt": float(groups.counts.float().mean()),
        "advantage_variance": float(advantages.var(unbiased=False)) if len(advantages) else math.nan,
        "prior_squared_error": off,
    }


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
