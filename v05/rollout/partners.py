"""What a scheduler asks of those that it works with beside the engine: where prompts come from, and who judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """The endless stream of prompts, with what is expected of each."""

    def __call__(self, first: int, count: int) -> tuple[Sequence[str], Tensor]:
        """Return `count` prompts from position `first` on, and their expected rewards [count] float32."""
        ...


class Judge(Protocol):
    """Says what answers are worth, now or later; see `v05.tasks.grading`."""

    def submit(self, prompt: str, text: str, finished: bool) -> int:
        """Ask for a reward and return its ticket."""
        ...

    def ready(self, ticket: int) -> bool:
        """Return whether `collect` would not wait."""
        ...

    def collect(self, tickets: Sequence[int]) -> list[float]:
        """Return the rewards of these tickets, waiting where they are not there yet."""
        ...
