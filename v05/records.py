"""Rollout records, one group of rollouts a line: read in blocks, checked, written whole or not at all.

A record is a JSON object `{"prompt": str, "rewards": [float, ...], "prior": float}`; more keys pass through.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from v05.errors import BadLine, InputError

READABLE: Final = "allowed: a readable file, or - for standard input"


@dataclass
class Block:
    """Consecutive records: the parsed objects, the lines they were on, the bad lines among them, bytes read so far."""

    records: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    bad: list[tuple[BadLine, bytes]] = field(default_factory=list)
    bytes_read: int = 0


def check_number(value: Any, where: str, low: float, high: float) -> float:
    """Return a number in [low, high], and raise ValueError saying where for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {json.dumps(value)[:40]}; allowed: a number from {low:g} to {high:g}")
    if not low <= value <= high:
        shown = f"{value:g}" if isinstance(value, float) else str(value)[:40]
        raise ValueError(f"{where} is {shown}; allowed: {low:g} to {high:g}")
    return float(value)


def check_range(low: float, high: float) -> None:
    """Raise InputError unless a reward range is two finite numbers that ascend."""
    if not -math.inf < low < high < math.inf:
        raise InputError(f"--reward-range is {low:g} {high:g}; allowed: smallest, then a larger largest, both finite")


def check_text(text: str, name: str) -> None:
    """Raise ValueError where a text holds what no tokenizer takes: half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a surrogate pair at character {error.start}; allowed: Unicode") from None


def parse_object(text: bytes, keys: str) -> dict[str, Any]:
    """Return one line as a JSON object; `keys` says in the error what it should hold.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    try:
        line = text.decode("utf-8").removeprefix("\ufeff").rstrip("\r\n")
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"{json.dumps(record)[:40]} is not an object; allowed: {keys} and more keys")
    return record


def check_prompt(record: dict[str, Any]) -> None:
    """Raise ValueError where a record has no prompt, or one that is not a string."""
    if not isinstance(record["prompt"], str):
        raise ValueError(f"prompt is {json.dumps(record['prompt'])[:40]}; allowed: a string")


def check_finite(record: dict[str, Any]) -> None:
    """Raise ValueError where a value, however deep, is a float that JSON cannot write."""
    for key, value in record.items():
        pending = [value]
        while pending:
            inner = pending.pop()
            if isinstance(inner, dict):
                pending += inner.values()
            elif isinstance(inner, list):
                pending += inner
            elif isinstance(inner, float) and not math.isfinite(inner):
                raise ValueError(f"{key} holds {inner}; allowed: finite numbers, for JSON has no others")


def check_keys(record: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Raise ValueError naming the first key that a record lacks."""
    for key in keys:
        if key not in record:
            raise ValueError(f"key {key!r} is missing")


def parse_record(text: bytes, low: float, high: float) -> dict[str, Any]:
    """Return one line of rollouts, checked.

    Args:
        text: the line, UTF-8.
        low, high: the reward range, which rewards and prior must lie in.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    record = parse_object(text, "prompt, rewards, prior")
    check_keys(record, ("prompt", "rewards", "prior"))
    check_prompt(record)
    if not isinstance(record["rewards"], list):
        raise ValueError(f"rewards is {json.dumps(record['rewards'])[:40]}; allowed: a list of numbers")
    for i, reward in enumerate(record["rewards"]):
        check_number(reward, f"rewards[{i}]", low, high)
    check_number(record["prior"], "prior", low, high)
    check_finite(record)
    return record


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; {READABLE}") from None
        yield handle


def read_blocks(
    path: str,
    low: float,
    high: float,
    skip_bad: bool = False,
    size: int = 8192,
    parse: Callable[[bytes, float, float], dict[str, Any]] = parse_record,
) -> Iterator[Block]:
    """Yield blocks of records, of at most `size` lines, so that memory does not grow with the file; skip blank lines.

    Raises:
        BadLine: at the first malformed line, unless `skip_bad` collects them in the block.
        InputError: the file cannot be opened.
    """
    block = Block()
    with _opened(path) as handle:
        for number, text in enumerate(handle, 1):
            block.bytes_read += len(text)
            try:
                if not text.isspace():
                    block.records.append(parse(text, low, high))
                    block.lines.append(number)
            except ValueError as error:
                bad = BadLine(path, number, str(error))
                if not skip_bad:
                    raise bad from None
                block.bad.append((bad, text))
            if number % size == 0:
                yield block
                block = Block(bytes_read=block.bytes_read)
    yield block


def bad_path(source: str, output: Path | None) -> Path:
    """Where malformed lines go: beside the output, else beside the source, else in the current folder."""
    beside = output or Path("stdin.jsonl" if source == "-" else source)
    if not beside.name:
        raise InputError(f"{source}: {os.strerror(errno.EISDIR)}; {READABLE}")
    return beside.with_name(beside.stem + ".bad.jsonl")


def write_line(record: Mapping[str, Any], out: IO[str]) -> None:
    """Write a record; characters stay as they are but where UTF-8 has none for them, as for half a surrogate pair."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(record)
    out.write(text + "\n")


@contextmanager
def aside(path: Path) -> Iterator[Callable[[Block], int]]:
    """Yield a function that writes a block's malformed lines, with numbers and reasons, and returns how many they are.

    The file is made at the first of them, and appears as `whole_file` has it.
    """
    with ExitStack() as stack:
        bad: IO[str] | None = None

        def put(block: Block) -> int:
            nonlocal bad
            if block.bad:
                bad = bad or stack.enter_context(whole_file(path))
                for error, raw in block.bad:
                    text = raw.decode("utf-8", "replace").rstrip("\n")
                    write_line({"line": error.line, "reason": error.reason, "text": text}, bad)
            return len(block.bad)

        yield put


def check_file(path: Path) -> Path:
    """Return the path without links, and raise InputError where no file can be there."""
    path = path.resolve()  # a link stays, and what it leads to is written
    rule = "allowed: a file in a folder that can be written"
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is {'a folder' if path.is_dir() else 'a device or a pipe'}; {rule}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: No such file or directory; {rule}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: Permission denied; {rule}")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[IO[str]]:
    """Open a file for writing that appears under its name only when everything was written."""
    path = check_file(path)
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")  # known before it exists, whatever comes then
    try:
        try:
            handle = name.open("x", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; allowed: a file in a folder that can be written") from None
        with handle:
            yield handle
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):  # not there yet, or a signal after it was renamed
            name.unlink()
        raise


@contextmanager
def whole_output(path: Path | None) -> Iterator[IO[str]]:
    """Do the same, or where there is no path open a file that goes to standard output when everything was written."""
    if path is not None:
        with whole_file(path) as out:
            yield out
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        yield out
        out.seek(0)
        sys.stdout.flush()
        shutil.copyfileobj(out.buffer, sys.stdout.buffer)  # UTF-8, whatever the terminal's encoding
        sys.stdout.buffer.flush()
