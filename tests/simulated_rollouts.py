"""A scheduler over a simulated engine, and engines that fail in chosen ways."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from v05.rollout.budget import BudgetRule
from v05.rollout.engine import Rollout
from v05.rollout.limits import Limits
from v05.rollout.scheduler import Scheduler
from v05.rollout.simulated import SimulatedEngine
from v05.rollout.step import Step
from v05.rollout.streaming import EngineDied, Outcome, Request, StreamingEngine

LONG = 1e9


class Signs:
    """Judges at once: 1 for `1`, else -1."""

    def __init__(self) -> None:
        self.rewards: dict[int, float] = {}
        self.asked: list[tuple[str, str]] = []

    def submit(self, prompt: str, text: str, finished: bool) -> int:
        self.asked.append((prompt, text))
        if text != "1" or not finished:
            return -1  # the same ticket for all that need no judging
        self.rewards[len(self.asked)] = 1.0
        return len(self.asked)

    def ready(self, ticket: int) -> bool:
        return True

    def collect(self, tickets: Sequence[int]) -> list[float]:
        return [self.rewards.pop(ticket) if ticket >= 0 else -1.0 for ticket in tickets]


def success(prompt: str) -> float:
    """How likely an answer to prompt number `prompt` is right; a fifth of prompts are certain, either way."""
    return (0.0, 0.2, 0.5, 0.8, 1.0)[int(prompt) % 5]


def source(first: int, count: int) -> tuple[list[str], Tensor]:
    """Prompts `first`, `first + 1`, ... and what is expected: right for most, far off for every third."""
    prompts = [str(first + row) for row in range(count)]
    expected = [2 * success(prompt) - 1 if int(prompt) % 3 else 0.9 for prompt in prompts]
    return prompts, torch.tensor(expected)


def short(draw: random.Random) -> int:
    """Lengths from 1 to 40 tokens."""
    return draw.randint(1, 40)


def limits(mode: str = "stream", **changes: object) -> Limits:
    return Limits(**{"prompts": 6, "mode": mode, "max_new_tokens": 64, "seconds": LONG, "poll": LONG, **changes})  # type: ignore[arg-type]


def scheduler(
    rule: BudgetRule, limits: Limits, engine: StreamingEngine | None = None, slots: int = 8, seed: int = 0
) -> Scheduler:
    """A scheduler whose clock is its simulated engine's."""
    engine = engine or SimulatedEngine(slots, success, short)
    clock = engine.clock  # type: ignore[attr-defined]
    return Scheduler(engine, source, Signs(), rule, limits, seed, clock, encode=lambda prompt: (1,))


def steps_of(made: Scheduler, count: int) -> list[Step]:
    found = []
    for version in range(count):
        step = made.next_step()
        assert step is not None
        found.append(step)
        made.push({}, version + 1)
    return found


def rewards_of(steps: list[Step]) -> list[list[list[float]]]:
    return [[[group.rewards[place] for place in group.in_order] for group in step.groups] for step in steps]


def check_whole(steps: list[Step], k_max: int) -> None:
    """Steps in order; groups in order; every rollout that was asked for is there once, or given up."""
    assert [step.number for step in steps] == list(range(len(steps)))
    positions = [group.position for step in steps for group in step.groups]
    assert positions == list(range(len(positions)))
    for step in steps:
        for group in step.groups:
            assert group.done
            assert group.waiting == 0
            assert group.requested <= k_max
            assert set(group.rewards) == set(group.rollouts)
            assert set(group.rewards) <= set(range(group.requested))
            assert len(group.rewards) == group.requested - group.given_up


def go_on(first: Scheduler, second: Scheduler) -> None:
    """Have a fresh scheduler go on from where another one is, by way of JSON and tensors."""
    state, tokens = first.state()
    second.load_state(json.loads(json.dumps(state)), tokens)


class Faulty:
    """A simulated engine whose answers go wrong at random; every kind of fault that is asked for comes up."""

    def __init__(self, inner: SimulatedEngine, faults: Mapping[str, float], seed: int = 0) -> None:
        self.inner, self.faults, self.draw = inner, faults, random.Random(seed)
        self.clock = inner.clock
        self.held: list[tuple[float, Outcome]] = []
        self.pushed: list[int] = []
        self.taken_back: list[int] = []
        self.deaths = 0

    def _happens(self, fault: str) -> bool:
        return self.draw.random() < self.faults.get(fault, 0.0)

    def submit(self, requests: Sequence[Request]) -> None:
        if self._happens("dies"):
            self._die()
        self.inner.submit(requests)

    def _die(self) -> None:
        self.deaths += 1
        self.inner.restart()
        raise EngineDied("its process is gone")

    def wait(self, timeout: float) -> list[Outcome]:
        if self._happens("dies"):
            self._die()
        answers = self.inner.wait(timeout)
        outcomes = [outcome for time, outcome in self.held if time <= self.clock()]
        self.held = [entry for entry in self.held if entry[0] > self.clock()]
        for outcome in answers:
            if self._happens("late"):
                self.held.append((self.clock() + 600, outcome))
                continue
            if self._happens("silent"):
                continue  # never answered: its request is late one day
            if self._happens("error"):
                outcome = Outcome(outcome.number, None, "out of memory")
            elif self._happens("garbage"):
                outcome = replace(outcome, rollout=spoilt(outcome.rollout, self.draw))
            outcomes.append(outcome)
            if self._happens("twice"):
                outcomes.append(outcome)
            if self._happens("stranger"):
                outcomes.append(Outcome(10**9, outcome.rollout))
        return outcomes

    def abort(self, numbers: Sequence[int]) -> None:
        self.taken_back += numbers
        self.inner.abort(numbers)

    def update_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        self.pushed.append(version)
        self.inner.update_weights(weights, version)

    def restart(self) -> None:
        self.inner.restart()

    def close(self) -> None:
        self.inner.close()


def spoilt(rollout: Rollout | None, draw: random.Random) -> Rollout:
    """An answer that cannot be right."""
    assert rollout is not None
    return draw.choice(
        [
            replace(rollout, prompt_ids=(0, 0)),
            replace(rollout, logprobs=rollout.logprobs[1:]),
            replace(rollout, logprobs=(float("nan"), float("inf"), float("-inf")), token_ids=(0,) * 3, versions=()),
            replace(rollout, logprobs=(float("nan"), *rollout.logprobs[1:])),
            replace(rollout, logprobs=(0.5, *rollout.logprobs[1:])),
            replace(rollout, logprobs=(float("-inf"), *rollout.logprobs[1:])),
            replace(rollout, token_ids=(), logprobs=(), versions=()),
            replace(rollout, versions=(*rollout.versions, 0)),
            replace(rollout, token_ids=(0,) * 999, logprobs=(-1.0,) * 999, versions=()),
        ]
    )
