"""The book of requests that an engine has not answered yet: whose they are, since when, and what is a fair answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, Literal

from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.step import Group, Step
from v05.rollout.streaming import Request
from v05.seeds import seed_of

ROUNDING: Final = 1e-4  # a log-prob may be above 0 by so much
REMEMBERED: Final = 2**16  # numbers of requests taken back; most are never answered, since the engine knows of it


@dataclass
class Asked:
    """A request, the step, the group and the place in it that its answer belongs to, and when it is late."""

    request: Request
    step: Step
    group: Group
    place: int
    deadline: float
    attempt: int = 1


class Requests:
    """Requests by number; every attempt has a number of its own, so that a late answer is not taken for another."""

    def __init__(self, limits: Limits, seed: int, clock: Callable[[], float]) -> None:
        """Start with no request."""
        self.limits, self.seed, self.clock = limits, seed, clock
        self.waiting: dict[int, Asked] = {}
        self.numbers = 0
        self.withdrawn: set[int] = set()  # newest numbers whose answers, should they come, are late
        self._left = clock()  # when answers were looked for last

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While answers are looked for: no other time counts towards the deadlines of requests that wait."""
        away = self.clock() - self._left
        for asked in self.waiting.values():
            asked.deadline += away
        try:
            yield
        finally:
            self._left = self.clock()

    def new(self, step: Step, group: Group, place: int, urgent: bool) -> Request:
        """Return a request for one rollout, entered in the book."""
        seed = seed_of("rollout", self.seed, group.position, place)
        request = Request(0, group.prompt, seed, self.limits.temperature, self.limits.max_new_tokens, urgent)
        return self._enter(Asked(request, step, group, place, 0.0))

    def again(self, asked: Asked) -> Request:
        """Return the next attempt at a request, with the same seed, ahead of others."""
        return self._enter(replace(asked, request=replace(asked.request, urgent=True), attempt=asked.attempt + 1))

    def renumbered(self, asked: Asked) -> Request:
        """Return a request for a fresh engine; that the old one died is not its fault."""
        return self._enter(asked)

    def _enter(self, asked: Asked) -> Request:
        self.numbers += 1
        request = replace(asked.request, number=self.numbers)
        deadline = self.clock() + self.limits.seconds
        self.waiting[self.numbers] = replace(asked, request=request, deadline=deadline)
        return request

    def take_all(self) -> list[Asked]:
        """Return everything that waits, and forget it."""
        everything = list(self.waiting.values())
        self._withdraw(self.waiting)
        self.waiting.clear()
        return everything

    def patience(self) -> float:
        """Return the seconds until the first request is late, at least 0."""
        if not self.waiting:
            return 0.0
        return max(0.0, next(iter(self.waiting.values())).deadline - self.clock())

    def late(self) -> list[Asked]:
        """Return the requests that took too long, and forget them."""
        now, found = self.clock(), []
        for asked in self.waiting.values():  # in the order of their deadlines
            if asked.deadline > now:
                break
            found.append(asked)
        for asked in found:
            del self.waiting[asked.request.number]
        self._withdraw(asked.request.number for asked in found)
        return found

    def _withdraw(self, numbers: Iterable[int]) -> None:
        self.withdrawn.update(numbers)
        if len(self.withdrawn) > REMEMBERED:
            self.withdrawn = set(sorted(self.withdrawn)[-(REMEMBERED // 2) :])

    def stray(self, number: int) -> Literal["late", "duplicates", "unknown"]:
        """Return what an answer is that nobody waits for: taken back before, a second one, or to no request at all."""
        if number in self.withdrawn:
            self.withdrawn.discard(number)
            return "late"
        return "duplicates" if 1 <= number <= self.numbers else "unknown"

    def fault(self, asked: Asked, rollout: Rollout) -> str:
        """Return why an answer cannot be right: its lengths, its log-probs, another prompt; empty where it can."""
        tokens, logprobs, longest = len(rollout.token_ids), rollout.logprobs, asked.request.max_new_tokens
        if not 0 < tokens <= longest:
            return f"it has {tokens} tokens; allowed: 1 to {longest}"
        if len(logprobs) != tokens or len(rollout.versions) not in (0, tokens):
            return f"it has {tokens} tokens, {len(logprobs)} log-probs and {len(rollout.versions)} versions"
        if not isinstance(rollout.text, str):
            return f"its text is a {type(rollout.text).__name__}"
        if not all(map(math.isfinite, logprobs)) or max(logprobs) > ROUNDING:
            return "a log-prob is above 0 or not finite"
        if asked.group.prompt_ids not in ((), tuple(rollout.prompt_ids)):
            return "it answers another prompt than the group's other rollouts"
        return ""
