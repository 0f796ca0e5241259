"""The book of requests that an engine has not answered yet: whose they are, since when, and what is a fair answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.step import Group, Step
from v05.rollout.streaming import Request
from v05.seeds import seed_of

ROUNDING: Final = 1e-4  # a log-prob may be above 0 by so much


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
        return found

    def fair(self, asked: Asked, rollout: Rollout) -> bool:
        """Return whether an answer can be right: its lengths, its log-probs, and the prompt its group answers."""
        tokens, logprobs = rollout.token_ids, rollout.logprobs
        if not 0 < len(tokens) <= asked.request.max_new_tokens or len(logprobs) != len(tokens):
            return False
        if len(rollout.versions) not in (0, len(tokens)) or not isinstance(rollout.text, str):
            return False
        if max(logprobs) > ROUNDING or not math.isfinite(math.fsum(logprobs)):
            return False
        return asked.group.prompt_ids in ((), tuple(rollout.prompt_ids))
