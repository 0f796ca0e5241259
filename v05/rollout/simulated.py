"""A continuous-batching engine in virtual time: slots, a queue, and a length drawn for every answer."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from torch import Tensor

from v05.rollout.engine import Rollout
from v05.rollout.streaming import Outcome, Request

MEDIAN: Final = 2000.0  # tokens
SIGMA: Final = 0.8  # of the logarithm
LONGEST: Final = 16_384


@dataclass(frozen=True)
class LogNormal:
    """Lengths of answers: `exp` of a normal number, at least 1 and at most `longest`."""

    median: float = MEDIAN
    sigma: float = SIGMA
    longest: int = LONGEST

    def __call__(self, draw: random.Random) -> int:
        """Return a length in tokens."""
        return max(1, min(self.longest, round(self.median * math.exp(self.sigma * draw.gauss(0, 1)))))


@dataclass(frozen=True)
class Observed:
    """Lengths of answers as they were recorded."""

    lengths: tuple[int, ...]

    def __call__(self, draw: random.Random) -> int:
        """Return one of them."""
        return draw.choice(self.lengths)


class SimulatedEngine:
    """Answers requests as an engine with `slots` would that decodes one token of each in a step of unit time.

    `now` is the time in decode steps; it moves in `wait` alone. An answer's length and whether it is right follow from
    its request's seed, so that every way of scheduling meets the same answers. Reading a prompt takes no time.
    """

    def __init__(
        self,
        slots: int,
        success: Callable[[str], float],
        length: Callable[[random.Random], int] = LogNormal(),
        steps_per_token: int = 1,
    ) -> None:
        """Start at time 0.

        Args:
            slots: answers decoded at once, 1 or more.
            success: probability that an answer to this prompt is right; right answers read `1`, wrong ones `0`.
            length: decode steps of an answer.
            steps_per_token: decode steps that one token of a `Rollout` stands for, to save memory in large simulations.

        Raises:
            ValueError: no slot, or less than one step per token.
        """
        for name, value in (("slots", slots), ("steps_per_token", steps_per_token)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        self.slots, self.success, self.length, self.steps_per_token = slots, success, length, steps_per_token
        self.now = 0.0
        self.busy = 0.0  # slot-steps in which a token was decoded
        self.version = 0
        self._queue: list[tuple[bool, int, Request]] = []
        self._running: list[tuple[float, int]] = []  # when it ends, its number
        self._answers: dict[int, tuple[int, bool, int]] = {}  # length, right, version at the start
        self._submitted = 0

    def clock(self) -> float:
        """Return the time in decode steps."""
        return self.now

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, urgent ones first."""
        for request in requests:
            self._submitted += 1
            heapq.heappush(self._queue, (not request.urgent, self._submitted, request))
        self._fill()

    def wait(self, timeout: float) -> list[Outcome]:
        """Move on to where the next answer ends, by `timeout` decode steps at most, and return what ended."""
        end = self.now + timeout
        if not self._running or self._running[0][0] > end:
            self.now = end if self._running or math.isfinite(end) else self.now
            return []
        self.now = self._running[0][0]
        outcomes = []
        while self._running and self._running[0][0] <= self.now:
            _, number = heapq.heappop(self._running)
            if number in self._answers:
                length, right, version = self._answers.pop(number)
                self.busy += length
                tokens = -(-length // self.steps_per_token)
                outcomes.append(Outcome(number, _answer(tokens, right, version)))
        self._fill()
        return outcomes

    def abort(self, numbers: Sequence[int]) -> None:
        """Forget requests; their slots are free at once."""
        gone = set(numbers)
        self._queue = [entry for entry in self._queue if entry[2].number not in gone]
        heapq.heapify(self._queue)
        for number in gone & self._answers.keys():
            del self._answers[number]
        self._running = [entry for entry in self._running if entry[1] not in gone]
        heapq.heapify(self._running)
        self._fill()

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Note the version; answers carry the one that they were begun with."""
        self.version = version

    def restart(self) -> None:
        """Forget all requests."""
        self._queue, self._running, self._answers = [], [], {}

    def close(self) -> None:
        """Do nothing: nothing was started."""

    def _fill(self) -> None:
        while self._queue and len(self._running) < self.slots:
            _, _, request = heapq.heappop(self._queue)
            draw = random.Random(request.seed)
            right = draw.random() < self.success(request.prompt)
            length = min(self.length(draw), request.max_new_tokens * self.steps_per_token)
            self._answers[request.number] = (length, right, self.version)
            heapq.heappush(self._running, (self.now + length, request.number))


@lru_cache(maxsize=65_536)
def _answer(tokens: int, right: bool, version: int) -> Rollout:
    return Rollout((1,), (0,) * tokens, (-1.0,) * tokens, str(int(right)), True, (version,) * tokens)
