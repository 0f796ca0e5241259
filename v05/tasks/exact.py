"""Exact match: the answer and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exact:
    """The largest reward for the record's `answer`, white space around it aside; the smallest otherwise."""

    reward_range: tuple[float, float] = (0.0, 1.0)
    needs_answer = True

    def __call__(self, prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        """Return the reward of `completion`."""
        return self.reward_range[completion.strip() == str(record["answer"]).strip()]
