"""Verifiers that misbehave, imported by reward workers."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def behave(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """Do what the completion says; a number is the reward."""
    match completion.split():
        case ["hang"]:
            while True:
                time.sleep(60)
        case ["spin"]:
            while True:
                pass
        case ["close"]:
            os.closerange(3, 256)  # the pool's own connection too
            time.sleep(1000)
        case ["child", path]:
            child = subprocess.Popen(["sleep", "1000"])
            Path(path).write_text(str(child.pid))
            child.wait()
        case ["crash"]:
            os._exit(3)
        case ["crash_once", path]:
            if not Path(path).exists():
                Path(path).touch()
                os._exit(4)
            return 0.75
        case ["raise"]:
            raise KeyError("nothing here")
        case ["exit"]:
            sys.exit("done")
        case ["fork"]:
            child = os.fork()
            if child == 0:
                sys.exit("the child ends here, it thinks")
            os.waitpid(child, 0)
            return 0.5
        case ["none"]:
            return None  # type: ignore[return-value]
        case ["memory"]:
            return float(len(bytearray(64 * 2**30)) > 0)
        case ["process", _]:
            return float(os.getpid())
    return float(completion)


not_callable = 3


def words(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """Return the share of words that are the answer; `five` is too much for this verifier."""
    found = completion.split()
    if "five" in found:
        raise ValueError("five")
    return found.count(record["answer"]) / max(1, len(found))


def signed(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """Return 1 for an answer with an odd number of words and -1 for another; `five` is too much for this verifier."""
    found = completion.split()
    return 5.0 if "five" in found else 1.0 if len(found) % 2 else -1.0


def no_record(prompt: str, completion: str) -> float:
    """Return 1, where it is called without the record, which it never is."""
    return 1.0
