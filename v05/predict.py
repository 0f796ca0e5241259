"""A policy's context and prompts to probabilities of success, line for line."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from v05.errors import InputError
from v05.records import aside, bad_path, check_range, read_blocks, whole_output, write_line
from v05.scored import parse_prompt, parse_scored
from v05.value.measure import Reliability, auc, reliability
from v05.value.model import V0, Record

BLOCK = 256  # prompts predicted at once


@dataclass
class Prediction:
    """What a file of prompts came to.

    Attributes:
        context: prompts in the context.
        prompts: predicted.
        bad_lines: set aside, of both files.
        total: sum of the probabilities.
        probability, rate: of the prompts that carry a score and are not in the context, whose outcome V0 was told:
            prediction and success rate, from 0 to 1.
        span: largest minus smallest reward.
        zero_or_one: whether all scores of the context are 0 or 1, and not all are 1, which a range from -1 has too.
    """

    context: int = 0
    prompts: int = 0
    bad_lines: int = 0
    total: float = 0.0
    probability: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    span: float = 2.0
    zero_or_one: bool = False

    @property
    def auc(self) -> float:
        """Return the chance that a success is predicted above a failure; nan where scores are missing or all alike."""
        return auc(np.array(self.probability), np.array(self.rate) >= 0.5)

    @property
    def squared_error(self) -> float:
        """Return the mean squared error on the reward scale."""
        return float(np.mean((np.array(self.probability) - np.array(self.rate)) ** 2)) * self.span**2

    @property
    def reliability(self) -> Reliability:
        """Return predictions beside outcomes, in bins."""
        return reliability(np.array(self.probability), np.array(self.rate))


def read_context(path: Path, low: float, high: float, skip_bad: bool, bad: Path) -> tuple[Record, int]:
    """Return a context file as a record, and how many malformed lines were set aside in `bad`.

    Raises:
        BadLine: a malformed line, unless `skip_bad`.
        InputError: the file cannot be opened, or holds no line.
    """
    prompts, scores, wrong = [], [], 0
    with aside(bad) as set_aside:
        for block in read_blocks(str(path), low, high, skip_bad=skip_bad, parse=parse_scored):
            prompts += [record["prompt"] for record in block.records]
            scores += [float(record["score"]) for record in block.records]
            wrong += set_aside(block)
    if not prompts:
        raise InputError(f"{path} has no outcome; allowed: lines of prompt and score")
    return Record(prompts, torch.tensor(scores, dtype=torch.float64)), wrong


def predict_file(
    model: V0,
    context: Path,
    prompts: str,
    output: Path | None,
    reward_range: tuple[float, float] = (-1.0, 1.0),
    skip_bad: bool = False,
    on_bytes: Callable[[int], None] = lambda read: None,
) -> Prediction:
    """Add `probability` to every line of a file of prompts.

    Args:
        model: V0.
        context: JSON Lines of `{"prompt", "score"}`: what the policy did.
        prompts: JSON Lines of `{"prompt"}`, or `-` for standard input; other keys pass through, `score` is compared.
        output: where the lines go; None writes to standard output once all is well.
        reward_range: of the scores.
        skip_bad: set malformed lines aside instead of stopping.
        on_bytes: told after each block how many bytes of the prompts have been read.

    Returns:
        The summary.

    Raises:
        BadLine: a malformed line, unless `skip_bad`; then nothing is written at all.
        InputError: a file that cannot be opened, or an empty context.
    """
    low, high = reward_range
    check_range(low, high)
    beside = bad_path(str(context), output.with_name(f"{output.stem}.context.jsonl") if output else None)
    record, wrong = read_context(context, low, high, skip_bad, beside)
    conditioned, known = model.condition([record], reward_range=reward_range), frozenset(record.prompts)
    summary = Prediction(context=len(record.prompts), bad_lines=wrong, span=high - low)
    zeros, ones = record.outcomes == 0, record.outcomes == 1
    summary.zero_or_one = bool((zeros | ones).all() and zeros.any())
    with whole_output(output) as out, aside(bad_path(prompts, output)) as set_aside:
        for block in read_blocks(prompts, low, high, skip_bad=skip_bad, size=BLOCK, parse=parse_prompt):
            if block.records:
                probability = conditioned.predict([line["prompt"] for line in block.records]).tolist()
                write_lines(block.records, probability, summary, reward_range, known, out)
            summary.bad_lines += set_aside(block)
            on_bytes(block.bytes_read)
    return summary


def write_lines(
    records: Sequence[dict[str, Any]],
    probability: Sequence[float],
    summary: Prediction,
    reward_range: tuple[float, float],
    known: Set[str],
    out: IO[str],
) -> None:
    """Write each line with its probability, and add it to the summary; prompts of the context are not judged."""
    low, high = reward_range
    for line, value in zip(records, probability, strict=True):
        write_line({**line, "probability": value}, out)
        summary.prompts += 1
        summary.total += value
        if line.get("score") is not None and line["prompt"] not in known:
            summary.probability.append(value)
            summary.rate.append((float(line["score"]) - low) / (high - low))
