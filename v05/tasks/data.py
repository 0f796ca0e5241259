"""Problems to answer, as records of `prompt`, `answer` and more: from files, or data sets of the hub by name."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from v05.errors import InputError
from v05.fingerprint import fingerprint
from v05.records import check_text, parse_object, read_blocks

BOXED: Final = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Source:
    """Where problems come from, and how they are put.

    Attributes:
        place: a JSON Lines or Parquet file; or a data set's folder, or its name on the hub.
        split: of a data set; a file has none.
        prompt_key, answer_key: columns of the problem's text and of its answer; `a.b` is key `b` of column `a`. A
            conversation of one turn is its text.
        template: the prompt, `{prompt}` standing for the problem's text.
    """

    place: str
    split: str = "train"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    template: str = "{prompt}"


# Repositories, splits and columns as they are on the hub; 30, 30, 674, 500, 272 and 40 problems to evaluate on, and 17
# thousand, each in it a hundred times, to train on.
BENCHMARKS: Final[Mapping[str, Source]] = MappingProxyType(
    {
        "aime_2024": Source("HuggingFaceH4/aime_2024", "train", "problem", "answer", BOXED),
        "aime_2025": Source("math-ai/aime25", "test", "problem", "answer", BOXED),
        "olympiad_bench": Source("math-ai/olympiadbench", "test", "question", "final_answer", BOXED),
        "math500": Source("HuggingFaceH4/MATH-500", "test", "problem", "answer", BOXED),
        "minerva": Source("math-ai/minervamath", "test", "question", "answer", BOXED),
        "amc_2023": Source("math-ai/amc23", "test", "question", "answer", BOXED),
        "dapo_math_17k": Source("BytedTsinghua-SIA/DAPO-Math-17k", "train", "prompt", "reward_model.ground_truth"),
    }
)


def read_data(source: Source, needs_answer: bool = True) -> list[dict[str, Any]]:
    """Return the problems of a source, in its order.

    Args:
        source: where they are.
        needs_answer: whether a problem without an answer is an error.

    Returns:
        Records with `prompt`, as the template puts it; `answer`, text, where there is one; and the source's other
        columns. A prompt that occurs again with the same answer is left out.

    Raises:
        BadLine: a malformed line of JSON Lines.
        InputError: no such file or data set, no such column, an answer that is missing, a prompt with two answers, or
            no problem at all.
    """
    if "{prompt}" not in source.template:
        raise InputError(f"template is {source.template!r}; allowed: text with {{prompt}} in it")
    records: dict[str, dict[str, Any]] = {}
    for number, row in _rows(source):
        record = _record(row, source, needs_answer, f"{source.place}:{number}")
        before = records.setdefault(record["prompt"], record)
        if before.get("answer") != record.get("answer"):
            answers = f"{before.get('answer')!r} and {record.get('answer')!r}"
            raise InputError(f"{source.place}:{number}: a prompt with the answers {answers}; allowed: one answer")
    if not records:
        raise InputError(f"{source.place} has no problem; allowed: one or more")
    return list(records.values())


def digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a name that changes with any prompt or answer, or their order."""
    text = json.dumps([[record["prompt"], record.get("answer")] for record in records])
    return fingerprint([text.encode()])


def columns_digest(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a name that changes with any column, in order; of a value such as an image, only with its type."""

    def plain(value: Any) -> str:
        return repr(value) if isinstance(value, bytes | date | timedelta | Decimal) else type(value).__name__

    lines = (json.dumps(record, sort_keys=True, default=plain) for record in records)
    return fingerprint(line.encode() + b"\n" for line in lines)


def _record(row: Mapping[str, Any], source: Source, needs_answer: bool, where: str) -> dict[str, Any]:
    text, answer = _column(row, source.prompt_key), _column(row, source.answer_key)
    for key, value in ((source.prompt_key, text), *([(source.answer_key, answer)] if needs_answer else [])):
        if value is None:
            raise InputError(f"{where}: key {key!r} is missing; given: {', '.join(map(str, row))}")
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], Mapping):
        text = text[0].get("content")
    if not isinstance(text, str) or not text:
        shown = json.dumps(text, default=repr)[:40]
        raise InputError(f"{where}: {source.prompt_key} is {shown}; allowed: text, or one turn of a conversation")
    try:
        check_text(text, source.prompt_key)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    record = dict(row) | {"prompt": source.template.replace("{prompt}", text)}
    if answer is None:
        return record
    found = _text(answer)
    if needs_answer and not found:
        raise InputError(f"{where}: {source.answer_key} is blank; allowed: an answer")
    return record | {"answer": found}


def _column(row: Mapping[str, Any], key: str) -> Any:
    """Return what a row has under a key, or under the parts of a key with dots; None where there is nothing, or NaN."""
    value: Any = row
    for part in [key] if key in row else key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if isinstance(value, float) and math.isnan(value) else value


def _text(answer: Any) -> str:
    """Return an answer as text: the only one of a list, or all of them after commas."""
    if isinstance(answer, list | tuple):
        return ", ".join(_text(part) for part in answer)
    if isinstance(answer, float):
        return str(int(answer)) if answer.is_integer() else f"{Decimal(repr(answer)):f}"  # without an exponent
    return str(answer).strip()


def _rows(source: Source) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a source as they are, with their numbers from 1."""
    suffix = Path(source.place).suffix
    if suffix in (".jsonl", ".json"):
        return _lines(source.place, source.prompt_key)
    if suffix == ".parquet" and not Path(source.place).is_file():
        raise InputError(f"{source.place}: no such file")
    rows: Iterable[Mapping[str, Any]] = _load(source, suffix)
    return enumerate(rows, 1)


def _lines(path: str, key: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    def parse(text: bytes, low: float, high: float) -> dict[str, Any]:
        return parse_object(text, key)

    for block in read_blocks(path, 0.0, 1.0, parse=parse):
        yield from zip(block.lines, block.records, strict=True)


def _load(source: Source, suffix: str) -> Any:
    """Return a data set, read by `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"{source.place} needs the package datasets; install v05[data]") from None
    try:
        if suffix == ".parquet":
            return load_dataset("parquet", data_files=source.place, split="train")
        return load_dataset(source.place, split=source.split)
    except Exception as error:  # of the network, of the hub, of the files: the user's to mend, whatever its type
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise InputError(f"data set {source.place!r}, split {source.split!r}, cannot be loaded: {reason}") from error
