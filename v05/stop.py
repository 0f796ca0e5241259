"""Stops that are asked for: a signal is noted, and work ends where what it needs to go on is saved."""

import signal
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """A stop was asked for, and what is needed to go on is saved."""


class StopRequest:
    """Inside its `with` block, the first SIGINT or SIGTERM asks for a stop; the second has its usual effect."""

    def __init__(self) -> None:
        """Start without a request; the handlers are installed by `with`."""
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the handlers."""
        self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the previous handlers back."""
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
