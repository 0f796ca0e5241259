"""Scored prompts, `{"prompt": str, "score": float}` a line: one policy's context, or by policy those of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from v05.errors import InputError
from v05.records import check_finite, check_keys, check_number, check_prompt, check_text, parse_object, read_blocks
from v05.value.model import Record

LAST_STEP: Final = 1e15


@dataclass(frozen=True)
class Scored:
    """One prompt under one policy.

    Attributes:
        prompt: the text.
        score: mean reward.
        policy: whose it is.
        model, step: the policy's family and its age in updates, where the record says; "" and 0 otherwise.
    """

    prompt: str
    score: float
    policy: str = ""
    model: str = ""
    step: int = 0


def parse_scored(text: bytes, low: float, high: float) -> dict[str, Any]:
    """Return a line of a context: a prompt and its score inside [low, high].

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    record = parse_object(text, "prompt, score")
    check_keys(record, ("prompt", "score"))
    check_prompt(record)
    check_text(record["prompt"], "prompt")
    check_number(record["score"], "score", low, high)
    return record


def parse_prompt(text: bytes, low: float, high: float) -> dict[str, Any]:
    """Return a line with a prompt to predict; a score, where there is one, must lie inside [low, high].

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    record = parse_object(text, "prompt")
    check_keys(record, ("prompt",))
    check_prompt(record)
    check_text(record["prompt"], "prompt")
    if record.get("score") is not None:
        check_number(record["score"], "score", low, high)
    check_finite(record)
    return record


def read_scored(records: Path, prompts: Path | None, low: float, high: float) -> list[Scored]:
    """Return the records of one or several policies.

    A line has `score`, and `prompt` or, with a file of prompts, `dataset` and `id`; its policy is `policy`, or `model`
    and `step`, or one and the same where neither is given.

    Args:
        records: JSON Lines.
        prompts: JSON object from `{dataset}_{id}` to the text.
        low, high: the reward range.

    Raises:
        BadLine, InputError: a line or a file that is not as described.
    """
    texts = read_texts(prompts) if prompts is not None else None

    def parse(text: bytes, low: float, high: float) -> dict[str, Any]:
        record = parse_object(text, "prompt or dataset and id, score, policy or model and step")
        check_keys(record, ("score",) if "prompt" in record else ("dataset", "id", "score"))
        check_number(record["score"], "score", low, high)
        if "prompt" not in record:
            name = f"{record['dataset']}_{record['id']}"
            if texts is None or name not in texts:
                where = "--prompts is not given" if texts is None else f"{prompts} does not have it"
                raise ValueError(f"prompt of {name} is unknown: {where}; allowed: a prompt, or an id in that file")
            record["prompt"] = texts[name]
        check_prompt(record)
        check_text(record["prompt"], "prompt")
        if record.get("step") is not None:
            check_number(record["step"], "step", -LAST_STEP, LAST_STEP)
        return record

    found = []
    for block in read_blocks(str(records), low, high, parse=parse):
        found += [as_scored(record) for record in block.records]
    if not found:
        raise InputError(f"{records} has no record; allowed: one a line")
    return found


def as_scored(record: dict[str, Any]) -> Scored:
    """Return a parsed line as a record."""
    model, step = str(record.get("model", "")), record.get("step") or 0
    named = f"{model} step {step}" if model else ""
    return Scored(
        prompt=record["prompt"],
        score=float(record["score"]),
        policy=str(record.get("policy", named)),
        model=model,
        step=int(step),
    )


def read_texts(file: Path) -> dict[str, str]:
    """Return the prompts in a JSON object from id to text.

    Raises:
        InputError: the file cannot be read as that.
    """
    try:
        texts = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; allowed: a JSON object from id to prompt") from None
    except ValueError as error:
        raise InputError(f"{file}: {error}; allowed: a JSON object from id to prompt") from None
    if not isinstance(texts, dict):
        raise InputError(f"{file} holds a {type(texts).__name__}; allowed: a JSON object from id to prompt")
    return texts


def by_policy(records: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Return the records of each policy, in the order in which policies first appear."""
    policies: dict[str, list[Scored]] = {}
    for record in records:
        policies.setdefault(record.policy, []).append(record)
    return policies


def to_record(records: Sequence[Scored]) -> Record:
    """Return one policy's records as V0 takes them; a prompt that comes twice has its mean score."""
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record.prompt, []).append(record.score)
    means = [sum(values) / len(values) for values in scores.values()]
    return Record(list(scores), torch.tensor(means, dtype=torch.float64))


def read_records(records: Path, prompts: Path | None, low: float, high: float) -> dict[str, Record]:
    """Return what `read_scored` reads, one record a policy."""
    return {name: to_record(rows) for name, rows in by_policy(read_scored(records, prompts, low, high)).items()}
