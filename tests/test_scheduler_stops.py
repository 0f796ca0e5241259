"""The streaming scheduler, stopped and gone on with: everything that had finished is kept."""

import json

import pytest
import torch

from tests.simulated_rollouts import (
    Faulty,
    Signs,
    check_whole,
    go_on,
    limits,
    rewards_of,
    scheduler,
    short,
    steps_of,
    success,
)
from v05.rollout.budget import LookAhead
from v05.rollout.simulated import SimulatedEngine


@pytest.mark.parametrize("when", [0, 1, 5, 17, 40])
def test_a_stop_keeps_everything_that_had_finished(when: int) -> None:
    clean = rewards_of(steps_of(scheduler(LookAhead(), limits()), 5))
    first, looks = scheduler(LookAhead(), limits()), iter(range(10**6))
    found = []
    while (step := first.next_step(lambda: next(looks) >= when)) is not None:
        found.append(step)
        first.push({}, len(found))
        if len(found) == 5:
            return
    kept = {(g.position, place) for step in first.steps for g in step.groups for place in g.rewards}
    second = scheduler(LookAhead(), limits())
    go_on(first, second)
    assert second.steps == first.steps
    assert {(g.position, place) for step in second.steps for g in step.groups for place in g.rewards} == kept
    gone = len(found)
    while len(found) < 5:
        step = second.next_step()
        assert step is not None
        found.append(step)
        second.push({}, len(found))
    check_whole(found, 16)
    assert rewards_of(found) == clean
    judged = sum(len(group.rewards) for step in (*found[gone:], *second.steps) for group in step.groups)
    assert len(second.judge.asked) == judged - len(kept)  # type: ignore[attr-defined]


def test_what_a_step_grows_by_is_counted_once_whenever_the_run_was_stopped() -> None:
    bounds = limits("planned", prompts=24, rollouts=24 * 4 + 12)
    clean = steps_of(scheduler(LookAhead(), bounds), 1)[0]
    for when in range(0, 120, 4):
        first, looks = scheduler(LookAhead(), bounds), iter(range(10**6))
        if first.next_step(lambda looks=looks, when=when: next(looks) >= when) is not None:  # type: ignore[misc]
            break
        second = scheduler(LookAhead(), bounds)
        go_on(first, second)
        step = steps_of(second, 1)[0]
        assert step.extra == clean.extra, when
    assert when > 40


class Slow(Signs):
    """Judges when asked to wait only."""

    def ready(self, ticket: int) -> bool:
        return False


@pytest.mark.parametrize("when", [10, 2000])
def test_a_stop_waits_for_what_is_being_judged(when: int) -> None:
    made, looks = scheduler(LookAhead(), limits()), iter(range(10**6))
    made.judge = Slow()
    assert made.next_step(lambda: next(looks) >= when) is None
    kept = sum(len(group.rewards) for step in made.steps for group in step.groups)
    assert kept == len(made.judge.asked) > 0  # type: ignore[attr-defined]
    again = scheduler(LookAhead(), limits())
    go_on(made, again)
    step = again.next_step(lambda: next(looks) >= 10**5)
    assert step is not None
    assert rewards_of([step]) == rewards_of(steps_of(scheduler(LookAhead(), limits()), 1))


def test_a_judge_is_waited_for_when_nothing_else_is() -> None:
    made, looks = scheduler(LookAhead(), limits()), iter(range(10**5))
    made.judge = Slow()
    step = made.next_step(lambda: next(looks) >= 10**5 - 1)
    assert step is not None
    assert rewards_of([step]) == rewards_of(steps_of(scheduler(LookAhead(), limits()), 1))


def test_a_reward_is_taken_while_the_engine_is_silent() -> None:
    """Prompt 1 is answered at 1 and judged at 1.01; prompt 0 takes until 50."""

    class Later(Signs):
        def ready(self, ticket: int) -> bool:
            return engine.now > 1

    class Watched(SimulatedEngine):
        def submit(self, requests) -> None:  # type: ignore[no-untyped-def]
            asked.extend((self.now, request.prompt) for request in requests)
            super().submit(requests)

    asked: list[tuple[float, str]] = []
    lengths = iter([50] * 4 + [1] * 100)
    engine = Watched(8, lambda prompt: 0.0, lambda draw: next(lengths))
    made = scheduler(LookAhead(), limits("planned", prompts=2), engine)
    made.source = lambda first, count: (["0", "1"], torch.tensor([-1.0, 0.9]))
    made.judge = Later()
    assert made.next_step() is not None
    assert {prompt for time, prompt in asked if 1 < time < 2} == {"1"}


def test_what_is_saved_as_json_does_not_grow_with_the_tokens() -> None:
    sizes = []
    for longest in (1, 200):
        engine = SimulatedEngine(8, success, lambda draw, longest=longest: longest)
        made, looks = scheduler(LookAhead(), limits(max_new_tokens=200), engine), iter(range(10**6))
        assert made.next_step(lambda looks=looks: next(looks) >= 3) is None
        state, tokens = made.state()
        sizes.append(len(json.dumps(state)))
        assert tokens["token_ids"].numel() == longest * len(tokens["token_ids_lengths"]) > 0
    assert sizes[1] < 1.5 * sizes[0]


def test_a_stop_is_seen_while_the_engine_is_silent() -> None:
    engine = SimulatedEngine(8, success, lambda draw: 1000)
    made = scheduler(LookAhead(), limits(poll=5.0, max_new_tokens=1000), engine)
    assert made.next_step(lambda: engine.now > 20) is None
    assert 20 < engine.now <= 25


def test_the_counts_survive_a_stop() -> None:
    engine = Faulty(SimulatedEngine(8, success, short), {"error": 0.3})
    made = scheduler(LookAhead(), limits(), engine)  # type: ignore[arg-type]
    steps_of(made, 2)
    again = scheduler(LookAhead(), limits())
    go_on(made, again)
    assert again.trouble.counts() == made.trouble.counts()
    assert made.trouble.failed > 0
    assert again.expected == made.expected != scheduler(LookAhead(), limits()).expected
    lost = [list(group.lost.items()) for step in made.steps for group in step.groups]
    assert [list(group.lost.items()) for step in again.steps for group in step.groups] == lost
