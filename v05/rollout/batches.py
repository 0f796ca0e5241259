"""Whole batches of rollouts from an engine that answers requests one by one."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, cast

from v05.rollout.engine import Rollout, Unanswered, check_request
from v05.rollout.streaming import Outcome, Request
from v05.seeds import seed_of

ATTEMPTS: Final = 3  # at one answer


class Batches(ABC):
    """Gives a streaming engine `generate`; outcomes of other requests that arrive meanwhile are kept for `wait`."""

    def __init__(self) -> None:
        self._kept: list[Outcome] = []
        self._numbers = itertools.count(-1, -1)  # a user's requests have numbers from 0

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests and return at once; see `StreamingEngine`."""

    @abstractmethod
    def abort(self, numbers: Sequence[int]) -> None:
        """Give up requests; see `StreamingEngine`."""

    @abstractmethod
    def _take(self, timeout: float) -> list[Outcome]:
        """Return what has finished, waiting for the first of it at most `timeout` seconds."""

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has finished since the last call; see `StreamingEngine`."""
        kept, self._kept = self._kept, []
        return kept or self._take(timeout)

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample answers; see `Engine`.

        Raises:
            ValueError: lengths differ, or a number is outside what is allowed.
            Unanswered: requests failed `ATTEMPTS` times each; the others have been waited for.
            EngineDied: the engine's process is gone.
        """
        check_request(prompts, counts, temperature, max_new_tokens)
        rows: list[list[Rollout | None]] = [[None] * count for count in counts]
        waiting: dict[int, tuple[int, int, int]] = {}  # by number: group, sample and attempt
        reasons: list[str] = []

        def request(group: int, sample: int, attempt: int) -> Request:
            number, draws = next(self._numbers), seed_of(seed, group, sample)
            waiting[number] = (group, sample, attempt)
            return Request(number, prompts[group], draws, temperature, max_new_tokens)

        requests = [request(group, sample, 1) for group, count in enumerate(counts) for sample in range(count)]
        while waiting:
            if requests:
                self.submit(requests)
            requests = []
            for outcome in self._take(60.0):
                if outcome.number not in waiting:
                    self._kept.append(outcome)
                    continue
                group, sample, attempt = waiting.pop(outcome.number)
                rows[group][sample] = outcome.rollout
                if outcome.rollout is None and attempt < ATTEMPTS:
                    requests.append(request(group, sample, attempt + 1))
                elif outcome.rollout is None:
                    reasons.append(f"answer {sample} to prompt {prompts[group]!r} failed: {outcome.error}")
        if reasons:
            raise Unanswered(rows, reasons)
        return cast(list[list[Rollout]], rows)
