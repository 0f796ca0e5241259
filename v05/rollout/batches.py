"""Whole batches of rollouts from an engine that answers requests one by one."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

from v05.rollout.engine import Rollout, check_request
from v05.rollout.streaming import Outcome, Request
from v05.seeds import seed_of


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
            RuntimeError: a request failed, with the engine's reason.
            EngineDied: the engine's process is gone.
        """
        check_request(prompts, counts, temperature, max_new_tokens)
        places: dict[int, tuple[int, int]] = {}
        requests = []
        for group, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            for sample in range(count):
                number = next(self._numbers)
                places[number] = (group, sample)
                draws = seed_of(seed, group, sample)
                requests.append(Request(number, prompt, draws, temperature, max_new_tokens))
        answers: dict[tuple[int, int], Rollout] = {}
        if requests:
            self.submit(requests)
        while len(answers) < len(requests):
            for outcome in self._take(60.0):
                if outcome.number not in places:
                    self._kept.append(outcome)
                elif outcome.rollout is None:
                    self.abort(list(places))
                    group, sample = places[outcome.number]
                    raise RuntimeError(f"answer {sample} to prompt {group} failed: {outcome.error}")
                else:
                    answers[places[outcome.number]] = outcome.rollout
        return [[answers[group, sample] for sample in range(count)] for group, count in enumerate(counts)]
