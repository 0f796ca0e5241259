"""Streaming rollouts: every prompt is tested as soon as its own rollouts are in, and nobody waits for stragglers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from v05.batch import offsets_from_lengths
from v05.rollout.budget import BudgetRule, share_out
from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.requests import Asked, Requests
from v05.rollout.step import Group, Step, Trouble
from v05.rollout.streaming import EngineDied, Outcome, StreamingEngine

GLANCE: Final = 0.05  # seconds between looks at rewards that are being judged


class NoRollouts(RuntimeError):
    """Not one rollout of a step could be had."""


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


@dataclass
class Scheduler:
    """Turns prompts into finished steps, in order; single-threaded, it works while `next_step` waits.

    Attributes:
        engine: answers requests as they finish.
        source: of prompts and priors.
        judge: of answers; it may take its time, generation goes on.
        rule: who gets how many.
        limits: what may be spent.
        seed: of the run; a rollout's own seed follows from it, the prompt's position and its place in the group, so
            that it is the same whatever else is going on.
        clock: seconds; the simulated engine brings its own.
        position: of the next prompt in the stream.
        next_number: of the next step.
        version: of the weights that were pushed last.
        steps: in flight, the oldest first.
        trouble: what went wrong, counted.
        given_up: prompts of rollouts that never came.
        reason: what was said of the last request that failed.
    """

    engine: StreamingEngine
    source: Source
    judge: Judge
    rule: BudgetRule
    limits: Limits
    seed: int = 0
    clock: Callable[[], float] = time.monotonic
    position: int = 0
    next_number: int = 0
    version: int = 0
    steps: list[Step] = field(default_factory=list)
    trouble: Trouble = field(default_factory=Trouble)
    given_up: list[str] = field(default_factory=list)
    reason: str = ""

    def __post_init__(self) -> None:
        """Set up the book of requests."""
        self.requests = Requests(self.limits, self.seed, self.clock)
        self.weights: Mapping[str, Tensor] | None = None
        self.deaths = 0
        self.judged: dict[int, tuple[Asked, Rollout]] = {}  # by ticket: what waits for its reward
        self.changed: dict[int, list[Group]] = {}  # by number of the step: groups that something came for

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give the engine the policy's weights; what is being answered goes on with them."""
        self.weights, self.version = weights, version
        self._alive(lambda: self.engine.update_weights(weights, version))

    def next_step(self, stopped: Callable[[], bool] = lambda: False) -> Step | None:
        """Return the next step once all its groups are finished.

        Args:
            stopped: asked again and again; when true nothing more is waited for.

        Returns:
            The step; None where it was stopped. `state` then has everything that had finished.

        Raises:
            EngineDied: more often in a row than `limits.restarts`.
            NoRollouts: every rollout of the step had to be given up.
        """
        while True:
            self._start()
            if self.steps and self.steps[0].done:
                return self._leave()
            if stopped():
                return None
            self._collect()
            self._test()

    def _start(self) -> None:
        """Start steps while they may be in flight."""
        while len(self.steps) < self.limits.in_flight:
            prompts, prior = self.source(self.position, self.limits.prompts)
            first = self.rule.first(prior).tolist()
            if self.limits.rollouts is not None:
                first = share_out(first, [0.0] * len(first), self.limits.rollouts)
            groups = [
                Group(self.position + row, prompt, expected, done=count == 0)
                for row, (prompt, expected, count) in enumerate(zip(prompts, prior.tolist(), first, strict=True))
            ]
            step = Step(self.next_number, groups, self.version)
            self.position += len(groups)
            self.next_number += 1
            self.steps.append(step)
            self._ask(step, groups, first, urgent=False)

    def _leave(self) -> Step:
        """Take the oldest step off the list."""
        step = self.steps.pop(0)
        outcome = step.outcome
        if not len(outcome.rewards) and any(group.given_up for group in step.groups):
            raise NoRollouts(f"step {step.number}: no rollout came for any of its prompts; last: {self.reason}")
        self.rule.learn(outcome.rewards, outcome.offsets, step.prior)
        return step

    def _ask(self, step: Step, groups: Sequence[Group], counts: Sequence[int], urgent: bool) -> None:
        requests = [
            self.requests.new(step, group, group.requested + extra, urgent)
            for group, count in zip(groups, counts, strict=True)
            for extra in range(count)
        ]
        for group, count in zip(groups, counts, strict=True):
            group.requested += count
        self._alive(lambda: self.engine.submit(requests))

    def _collect(self) -> None:
        """Wait for outcomes, check them, and have them judged or asked for again; take the rewards that are there."""
        again: list[Asked] = []
        if self.requests.waiting:
            patience = self.requests.patience()
            outcomes = self._alive(lambda: self.engine.wait(min(patience, GLANCE) if self.judged else patience))
            for outcome in outcomes or ():
                again += self._receive(outcome)
        late = self.requests.late()
        if late:
            self.trouble.timed_out += len(late)
            self.reason = f"no answer within {self.limits.seconds:g} seconds"
            self._alive(lambda: self.engine.abort([asked.request.number for asked in late]))
        self._again([*again, *late])
        tickets = [ticket for ticket in self.judged if self.judge.ready(ticket)]
        if not tickets and not self.requests.waiting:
            tickets = list(self.judged)
        for ticket, reward in zip(tickets, self.judge.collect(tickets), strict=True):
            asked, rollout = self.judged.pop(ticket)
            asked.group.rollouts[asked.place], asked.group.rewards[asked.place] = rollout, float(reward)
            self.changed.setdefault(asked.step.number, []).append(asked.group)

    def _receive(self, outcome: Outcome) -> list[Asked]:
        """Have an answer judged; return its request where it has to be asked again."""
        asked = self.requests.waiting.pop(outcome.number, None)
        if asked is None:
            self.trouble.unknown += 1
            return []
        rollout = outcome.rollout
        if rollout is None or not self.requests.fair(asked, rollout):
            self.trouble.failed += rollout is None
            self.reason = outcome.error if rollout is None else "an answer that cannot be right"
            self.trouble.garbage += rollout is not None
            return [asked]
        self.deaths = 0
        ticket = self.judge.submit(asked.group.prompt, rollout.text, rollout.finished)
        self.judged[ticket] = (asked, rollout)
        asked.group.prompt_ids = asked.group.prompt_ids or tuple(rollout.prompt_ids)
        return []

    def _again(self, asked: Sequence[Asked]) -> None:
        """Ask again, with the same seed, unless it was tried often enough."""
        requests = []
        for each in asked:
            if each.attempt < self.limits.attempts:
                requests.append(self.requests.again(each))
                continue
            each.group.given_up += 1
            self.changed.setdefault(each.step.number, []).append(each.group)
            self.trouble.given_up += 1
            self.given_up.append(each.group.prompt)
        self.trouble.resubmitted += len(requests)
        if requests:
            self._alive(lambda: self.engine.submit(requests))

    def _alive(self, act: Callable[[], Any]) -> Any:
        """Use the engine; where it has died, start it again and give it everything it had."""
        try:
            return act()
        except EngineDied:
            unfinished = self.requests.take_all()
        while True:
            self.deaths += 1
            self.trouble.restarts += 1
            if self.deaths > self.limits.restarts:
                raise EngineDied(f"the engine died {self.deaths} times without a finished rollout in between")
            try:
                self.engine.restart()
                if self.weights is not None:
                    self.engine.update_weights(self.weights, self.version)
                again = [self.requests.renumbered(asked) for asked in unfinished]
                self.trouble.resubmitted += len(again)
                self.engine.submit(again)
                return None
            except EngineDied:
                unfinished = self.requests.take_all() or unfinished

    def _test(self) -> None:
        """Test the groups whose rollouts are all in, by one call for every step, and ask for what they get."""
        for step in self.steps:
            changed = self.changed.pop(step.number, ())
            if changed and self.limits.mode == "barrier":
                changed = () if any(group.waiting for group in step.groups) else step.groups
            ready = list({group.position: group for group in changed if not group.done and not group.waiting}.values())
            for group in ready:
                group.done = group.given_up > 0  # what could not be had once is not asked for more of
            if ready := [group for group in ready if not group.done]:
                self._grow(step, ready)

    def _grow(self, step: Step, ready: Sequence[Group]) -> None:
        rewards = [[group.rewards[place] for place in group.in_order] for group in ready]
        flat = torch.tensor([value for row in rewards for value in row], dtype=torch.float32)
        prior = torch.tensor([group.prior for group in ready], dtype=torch.float32)
        ask = self.rule.more(flat, offsets_from_lengths([len(row) for row in rewards]), prior)
        more = ask.more.tolist()
        step.conflicts += sum(count > 0 and not group.grown for count, group in zip(more, ready, strict=True))
        if self.limits.mode in ("barrier", "async"):
            more = [min(count, 1) for count in more]
        given = share_out(more, ask.gain.tolist(), self._left(step, sum(more)))
        for group, count in zip(ready, given, strict=True):
            group.done, group.grown = count == 0, group.grown or count > 0
        step.extra += sum(given)
        self._ask(step, ready, given, urgent=True)

    def _left(self, step: Step, wanted: int) -> int:
        """Return how many more rollouts a step may have."""
        if self.limits.tokens is not None and step.tokens >= self.limits.tokens:
            return 0
        if self.limits.rollouts is None:
            return wanted
        return max(0, self.limits.rollouts - sum(group.requested - group.given_up for group in step.groups))

    def state(self) -> dict[str, Any]:
        """Return everything that has finished and is not learnt from yet, as JSON can hold it."""
        steps = [step.state() for step in self.steps]
        return {"position": self.position, "next_number": self.next_number, "version": self.version, "steps": steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; rollouts that had not finished are asked for again, with the same seeds."""
        self.position, self.next_number, self.version = state["position"], state["next_number"], state["version"]
        self.steps = [Step.from_state(entry) for entry in state["steps"]]
        requests = []
        for step in self.steps:
            self.changed[step.number] = list(step.groups)
            for group in step.groups:
                lost = [place for place in range(group.requested) if place not in group.rewards]
                for place in lost[group.given_up :]:
                    requests.append(self.requests.new(step, group, place, urgent=True))
        self._alive(lambda: self.engine.submit(requests))
