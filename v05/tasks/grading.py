"""Graders: rewards that are asked for now and collected later."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from v05.errors import InputError
from v05.tasks.pool import RewardPool
from v05.tasks.worker import Verdict

HOPELESS: Final = 64  # answers without a reward, and none with one before them, that end a run

logger = logging.getLogger(__name__)


@dataclass
class Troubles:
    """Rewards that a verifier did not give, for which the smallest stands; the last reason, for a message.

    Attributes:
        failures: exceptions, rewards that are not allowed, and crashes.
        timeouts: answers that took too long to judge.
        reason: of the last one.
    """

    failures: int = 0
    timeouts: int = 0
    reason: str = ""


class Grader(Protocol):
    """Says what answers are worth."""

    def submit(self, prompt: str, text: str, finished: bool) -> int:
        """Ask for a reward and return its ticket; an answer that is not `finished` gets the smallest."""
        ...

    def collect(self, tickets: Sequence[int]) -> list[float]:
        """Return the rewards of these tickets, in this order, once, waiting for those that are not there yet."""
        ...

    def ready(self, ticket: int) -> bool:
        """Return whether `collect` would return this reward without waiting."""
        ...

    def take_troubles(self) -> Troubles:
        """Return what went wrong since the last call."""
        ...

    def close(self) -> None:
        """Stop what the grader has started; calling it twice is allowed."""
        ...


class InlineGrader:
    """Asks the task at once: for verifiers that take no time."""

    def __init__(self, verify: Callable[[str, str], float], smallest: float) -> None:
        """Grade by `verify(prompt, text)`; `smallest` is what an answer without an end gets."""
        self.verify, self.smallest = verify, smallest
        self._rewards: dict[int, float] = {}
        self._submitted = 0

    def submit(self, prompt: str, text: str, finished: bool) -> int:
        """Judge one answer and return its ticket."""
        self._rewards[self._submitted] = self.verify(prompt, text) if finished else self.smallest
        self._submitted += 1
        return self._submitted - 1

    def collect(self, tickets: Sequence[int]) -> list[float]:
        """Return the rewards of these tickets."""
        return [self._rewards.pop(ticket) for ticket in tickets]

    def ready(self, ticket: int) -> bool:
        """Return True: the reward is there."""
        return True

    def take_troubles(self) -> Troubles:
        """Return none: what the verifier raises stops the run."""
        return Troubles()

    def close(self) -> None:
        """Do nothing: nothing was started."""


class PoolGrader:
    """Asks a pool of processes, which goes on while the engine generates."""

    def __init__(self, pool: RewardPool, record_of: Callable[[str], Mapping[str, Any]]) -> None:
        """Grade by `pool`.

        Args:
            pool: its own from now on.
            record_of: the record of a prompt.
        """
        self.pool, self.record_of = pool, record_of
        self._troubles = Troubles()
        self._given = self._not_given = 0

    def submit(self, prompt: str, text: str, finished: bool) -> int:
        """Queue one answer and return its ticket; below 0 where nothing is to be judged."""
        return self.pool.submit(prompt, text, self.record_of(prompt)) if finished else -1

    def collect(self, tickets: Sequence[int]) -> list[float]:
        """Wait for the rewards of these tickets.

        Raises:
            InputError: the first `HOPELESS` answers got none, so that no other will.
        """
        verdicts = iter(self.pool.collect([ticket for ticket in tickets if ticket >= 0]))
        rewards = []
        for ticket in tickets:
            if ticket < 0:
                rewards.append(self.pool.reward_range[0])
                continue
            verdict = next(verdicts)
            rewards.append(verdict.reward)
            if verdict.problem:
                self._note(verdict)
            else:
                self._given += 1
        return rewards

    def _note(self, verdict: Verdict) -> None:
        """Count a reward that was not given; say so the first time, and whenever the count has doubled."""
        self._troubles.failures += verdict.problem == "failure"
        self._troubles.timeouts += verdict.problem == "timeout"
        self._troubles.reason = verdict.reason
        self._not_given += 1
        if self._not_given.bit_count() == 1:
            logger.warning("the verifier gave no reward %d times; last: %s", self._not_given, verdict.reason)
        if self._not_given >= HOPELESS and not self._given:
            none = f"the verifier gave no reward for any of its first {HOPELESS} answers"
            allowed = "allowed: the smallest reward for an answer that is wrong in any way"
            raise InputError(f"{none}; last: {verdict.reason}; {allowed}")

    def ready(self, ticket: int) -> bool:
        """Return whether the verdict is there, or none is needed."""
        return ticket < 0 or self.pool.done(ticket)

    def take_troubles(self) -> Troubles:
        """Return what went wrong since the last call."""
        taken, self._troubles = self._troubles, Troubles()
        return taken

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()
