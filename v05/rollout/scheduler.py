"""Streaming rollouts: every prompt is tested as soon as its own rollouts are in, and nobody waits for stragglers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from v05.rollout import rules
from v05.rollout.budget import BudgetRule
from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.partners import Judge, Source
from v05.rollout.requests import Asked, Requests
from v05.rollout.revived import RevivedEngine
from v05.rollout.saved import steps_of, tokens_of
from v05.rollout.share import share_out
from v05.rollout.step import Group, Step, Trouble, Wish
from v05.rollout.streaming import Outcome, StreamingEngine

logger = logging.getLogger(__name__)

GLANCE: Final = 0.05  # seconds between looks at rewards that are being judged


class NoRollouts(RuntimeError):
    """Not one rollout of a step could be had."""


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
        encode: returns the token ids that the engine must have read for a prompt; None to ask only that all rollouts
            of a group agree on them.
        position: of the next prompt in the stream.
        next_number: of the next step.
        steps: in flight, the oldest first.
        trouble: what went wrong, counted.
    """

    engine: StreamingEngine
    source: Source
    judge: Judge
    rule: BudgetRule
    limits: Limits
    seed: int = 0
    clock: Callable[[], float] = time.monotonic
    encode: Callable[[str], Sequence[int]] | None = None
    position: int = 0
    next_number: int = 0
    steps: list[Step] = field(default_factory=list)
    trouble: Trouble = field(default_factory=Trouble)

    def __post_init__(self) -> None:
        """Set up the book of requests."""
        self.requests = Requests(self.limits, self.seed, self.clock)
        self.revived = RevivedEngine(self.engine, self.requests, self.trouble, self.limits.restarts)
        self.wishes: dict[int, list[Wish]] = {}  # by number of the step: who waits for the step's other first tests
        self.expected = 2.0  # decayed mean of what a group wants at its first test
        self.judged: list[tuple[int, Asked, Rollout]] = []  # with the ticket of its reward; tickets may be alike
        self.changed: dict[int, list[Group]] = {}  # by number of the step: groups that something came for

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Give the engine the policy's weights; what is being answered goes on with them."""
        self.revived.push(weights, version)

    def next_step(self, stopped: Callable[[], bool] = lambda: False, left: int | None = None) -> Step | None:
        """Return the next step once all its groups are finished.

        Args:
            stopped: asked again and again; when true nothing more is waited for.
            left: rollouts that this step and all later ones may have together, 1 or more, with `limits.rollouts`; the
                last steps wait for those before them, and have what is then left. None for no end.

        Returns:
            The step; None where it was stopped. `state` then has everything that had finished.

        Raises:
            EngineDied: more often in a row than `limits.restarts`.
            NoRollouts: every rollout of the step had to be given up.
        """
        with self.requests.watched():
            while True:
                self._start(left)
                if self.steps and self.steps[0].done:
                    return self._leave()
                if stopped():
                    self._reward(self.judged)
                    return None
                self._collect()
                self._test()

    def _start(self, left: int | None) -> None:
        """Start steps while they may be in flight; prompts that the cap does not reach stay on the stream."""
        encode = self.encode or (lambda prompt: ())
        while len(self.steps) < self.limits.in_flight and (budget := self._budget(left)) != 0:
            prompts, prior = self.source(self.position, self.limits.prompts)
            groups = [
                Group(self.position + row, prompt, expected, prompt_ids=tuple(encode(prompt)))
                for row, (prompt, expected) in enumerate(zip(prompts, prior.tolist(), strict=True))
            ]
            first = rules.first(self.rule, groups)
            if budget is not None and sum(first) > budget:
                first = share_out(first, [0.0] * len(first), budget)
                first = first[: 1 + max(row for row, count in enumerate(first) if count)]
            groups = groups[: len(first)]
            for group, count in zip(groups, first, strict=True):
                group.tested = group.done = count == 0
            step = Step(self.next_number, groups, budget)
            self.position += len(groups)
            self.next_number += 1
            self.steps.append(step)
            self._ask(step, groups, first, urgent=False)

    def _budget(self, left: int | None) -> int | None:
        """Return the cap of a step that starts now; 0 where it has to wait for what others leave, None for no cap."""
        cap = self.limits.rollouts
        if cap is None or left is None:
            return cap
        free = left - sum(step.budget or 0 for step in self.steps)
        return min(cap, free) if free >= cap or not self.steps else 0

    def _leave(self) -> Step:
        """Take the oldest step off the list."""
        step = self.steps.pop(0)
        if step.lost and not any(group.rewards for group in step.groups):
            raise NoRollouts(f"step {step.number}: no rollout came for any of its prompts; last: {step.lost[-1]}")
        rules.learn(self.rule, step.groups)
        return step

    def _ask(self, step: Step, groups: Sequence[Group], counts: Sequence[int], urgent: bool) -> None:
        requests = [
            self.requests.new(step, group, group.requested + extra, urgent)
            for group, count in zip(groups, counts, strict=True)
            for extra in range(count)
        ]
        for group, count in zip(groups, counts, strict=True):
            group.requested += count
        self.revived.submit(requests)

    def _collect(self) -> None:
        """Wait for outcomes, check them, and have them judged or asked for again; take the rewards that are there."""
        again: list[tuple[Asked, str]] = []
        if self.requests.waiting:
            patience = min(self.requests.patience(), self.limits.poll)
            for outcome in self.revived.wait(min(patience, GLANCE) if self.judged else patience):
                again += self._receive(outcome)
        late = self.requests.late()
        if late:
            self.trouble.timed_out += len(late)
            self.revived.abort([asked.request.number for asked in late])
        self._again([*again, *((asked, f"no answer in {self.limits.seconds:g} s") for asked in late)])
        ready = [each for each in self.judged if self.judge.ready(each[0])]
        self._reward(ready if ready or self.requests.waiting else self.judged)

    def _reward(self, answers: Sequence[tuple[int, Asked, Rollout]]) -> None:
        """Enter the rewards of these answers, waiting where they are not there yet."""
        low, high = self.rule.reward_range
        chosen = {id(asked) for _, asked, _ in answers}
        self.judged = [each for each in self.judged if id(each[1]) not in chosen]
        rewards = self.judge.collect([ticket for ticket, _, _ in answers])
        for (_, asked, rollout), reward in zip(answers, rewards, strict=True):
            if not low <= reward <= high:
                self.trouble.bad_rewards += 1
                self._lose(asked, f"its reward is {reward}; allowed: {low:g} to {high:g}")
                continue
            asked.group.rollouts[asked.place], asked.group.rewards[asked.place] = rollout, float(reward)
            self.changed.setdefault(asked.step.number, []).append(asked.group)

    def _receive(self, outcome: Outcome) -> list[tuple[Asked, str]]:
        """Have an answer judged; return its request where it has to be asked again, and why."""
        asked = self.requests.waiting.pop(outcome.number, None)
        if asked is None:
            kind = self.requests.stray(outcome.number)
            setattr(self.trouble, kind, getattr(self.trouble, kind) + 1)
            return []
        rollout = outcome.rollout
        if rollout is None:
            self.trouble.failed += 1
            return [(asked, outcome.error or "it failed without a reason")]
        if fault := self.requests.fault(asked, rollout):
            self.trouble.garbage += 1
            return [(asked, fault)]
        self.revived.lived()
        ticket = self.judge.submit(asked.group.prompt, rollout.text, rollout.finished)
        self.judged.append((ticket, asked, rollout))
        asked.group.prompt_ids = asked.group.prompt_ids or tuple(rollout.prompt_ids)
        return []

    def _again(self, asked: Sequence[tuple[Asked, str]]) -> None:
        """Ask again, with the same seed, unless it was tried often enough."""
        requests = []
        for each, reason in asked:
            if each.attempt < self.limits.attempts:
                requests.append(self.requests.again(each))
            else:
                self._lose(each, reason)
        self.trouble.resubmitted += len(requests)
        self.revived.submit(requests)

    def _lose(self, asked: Asked, reason: str) -> None:
        """Give a rollout up and say so; its group goes on with what it has."""
        asked.group.lost[asked.place] = reason
        self.changed.setdefault(asked.step.number, []).append(asked.group)
        self.trouble.given_up += 1
        logger.warning("rollout %d of prompt %r is given up: %s", asked.place, asked.group.prompt, reason)

    def _test(self) -> None:
        """Test the groups whose rollouts are all in, by one call for every step, and ask for what they get."""
        for step in self.steps:
            changed = self.changed.pop(step.number, ())
            if changed and self.limits.mode == "barrier":
                changed = () if any(group.waiting for group in step.groups) else step.groups
            ready = list({group.position: group for group in changed if not group.done and not group.waiting}.values())
            for group in ready:
                group.done = group.given_up > 0  # what could not be had once is not asked for more of
                group.tested = group.tested or group.done
            if ready := [group for group in ready if not group.done]:
                self._grow(step, ready)
            if step.number in self.wishes:
                self._divide(step)

    def _grow(self, step: Step, ready: Sequence[Group]) -> None:
        wishes = self.wishes.setdefault(step.number, [])
        for group, (more, gain) in zip(ready, rules.more(self.rule, ready), strict=True):
            if not group.tested:
                group.tested, self.expected = True, 0.98 * self.expected + 0.02 * more
            wishes.append(Wish(group, min(more, 1) if self.limits.mode in ("barrier", "async") else more, gain))

    def _divide(self, step: Step) -> None:
        """Give groups what they want; where a cap may bind, once all of the step are tested, largest gains first."""
        wishes = self.wishes.pop(step.number)
        wanted = [wish.more for wish in wishes]
        left = step.left if any(wanted) else None
        untested = sum(not group.tested for group in step.groups) if left is not None else 0
        if left is None:
            given = wanted
        elif untested and sum(wanted) + self.expected * untested > left:
            self.wishes[step.number] = [wish for wish in wishes if wish.more]
            wishes, given = [wish for wish in wishes if not wish.more], [0] * wanted.count(0)
        else:
            given = share_out(wanted, [wish.gain for wish in wishes], max(0, left))
        for wish, count in zip(wishes, given, strict=True):
            wish.group.done = count == 0
        step.extra += sum(given)
        self._ask(step, [wish.group for wish in wishes], given, urgent=True)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return everything that has finished and is not learnt from yet: as JSON can hold it, but for the tokens."""
        steps = [step.state() for step in self.steps]
        counts = {"position": self.position, "next_number": self.next_number}
        wishes = [[step, wish.group.position, *wish[1:]] for step, rows in self.wishes.items() for wish in rows]
        changed = [[step, group.position] for step, groups in self.changed.items() for group in groups]
        open_ends = {"expected": self.expected, "wishes": wishes, "changed": changed}
        return {**counts, **open_ends, "trouble": self.trouble.counts(), "steps": steps}, tokens_of(self.steps)

    def load_state(self, state: Mapping[str, Any], tokens: Mapping[str, Tensor]) -> None:
        """Go on from a state; rollouts that had not finished are asked for again, with the same seeds."""
        self.position, self.next_number = state["position"], state["next_number"]
        self.expected = state["expected"]
        for name, count in state["trouble"].items():
            setattr(self.trouble, name, count)
        self.steps = steps_of(state["steps"], tokens)
        requests, groups = [], {(step.number, group.position): group for step in self.steps for group in step.groups}
        for number, position, more, gain in state["wishes"]:
            self.wishes.setdefault(number, []).append(Wish(groups[number, position], more, gain))
        for number, position in state["changed"]:
            self.changed.setdefault(number, []).append(groups[number, position])
        for step in self.steps:
            for group in step.groups:
                for place in group.missing:
                    requests.append(self.requests.new(step, group, place, urgent=True))
        self.revived.submit(requests)
