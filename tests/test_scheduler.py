"""The streaming scheduler: by hand on small schedules, the same rollouts in every mode, staleness, what is refused."""

import random
from collections import Counter

import pytest
import torch

from tests.simulated_rollouts import (
    LONG,
    Signs,
    check_whole,
    limits,
    rewards_of,
    scheduler,
    short,
    source,
    steps_of,
    success,
)
from v05.kernels import shrinkage
from v05.rollout.budget import Fixed, LookAhead
from v05.rollout.engine import Rollout
from v05.rollout.limits import MODES
from v05.rollout.scheduler import Scheduler
from v05.rollout.simulated import SimulatedEngine
from v05.rollout.step import Group, Step
from v05.rollout.streaming import Request
from v05.seeds import seed_of


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_ends_where_the_test_says_stop(mode: str) -> None:
    steps = steps_of(scheduler(LookAhead(), limits(mode)), 4)
    check_whole(steps, 16)
    assert any(group.requested > 4 for step in steps for group in step.groups)
    for step in steps:
        outcome = step.outcome
        test = shrinkage(outcome.rewards, outcome.offsets, step.prior)
        assert not test.roll_out_more.any()
        assert step.extra == int((outcome.counts - 4).sum())


@pytest.mark.parametrize("first", MODES)
def test_a_rollout_is_the_same_in_every_mode_and_at_any_time(first: str) -> None:
    by_seed: dict[tuple[int, int], str] = {}
    for mode, slots in ((first, 8), ("stream", 3)):
        for step in steps_of(scheduler(LookAhead(), limits(mode), slots=slots), 3):
            for group in step.groups:
                for place, rollout in group.rollouts.items():
                    assert by_seed.setdefault((group.position, place), rollout.text) == rollout.text
    assert len(by_seed) >= 18 * 4


def test_streams_repeat_bit_for_bit() -> None:
    first, again = (rewards_of(steps_of(scheduler(LookAhead(), limits()), 5)) for _ in range(2))
    assert first == again
    assert first != rewards_of(steps_of(scheduler(LookAhead(), limits(), seed=1), 5))


class Lengths:
    """Answers whose length is looked up by seed, 1 where it is not named."""

    def __init__(self, by_place: dict[tuple[int, int], int]) -> None:
        self.by_first = {}
        for (position, place), length in by_place.items():
            draw = random.Random(seed_of("rollout", 0, position, place))
            draw.random()
            self.by_first[draw.random()] = length

    def __call__(self, draw) -> int:  # type: ignore[no-untyped-def]
        return self.by_first.get(draw.random(), 1)


def by_hand(mode: str, window: int = 1) -> list[float]:
    """When four steps of two prompts with two rollouts each leave; one answer of prompt 0 takes 10, all others 1."""
    engine = SimulatedEngine(4, success, Lengths({(0, 1): 10}))
    made = Scheduler(engine, source, Signs(), Fixed(2), limits(mode, prompts=2, window=window), 0, engine.clock)
    times = []
    for step in range(4):
        made.next_step()
        times.append(engine.now)
        made.push({}, step + 1)
    return times


def test_a_straggler_holds_up_its_own_step_alone() -> None:
    assert by_hand("planned") == [10, 11, 12, 13]
    # Three slots go on: 4 answers of a step take 4/3 on average, two steps ahead at most.
    assert by_hand("stream", window=3) == [10, 10, 10, 11]
    assert by_hand("stream", window=1) == [10, 11, 12, 13]


def test_staleness_is_bounded_by_the_window() -> None:
    for window in (1, 2, 4):
        worst = 0
        made = scheduler(LookAhead(), limits(window=window))
        for version in range(8):
            step = made.next_step()
            assert step is not None
            assert len(made.steps) < window
            worst = max(worst, *step.staleness(version))
            made.push({}, version + 1)
        assert worst <= window - 1
        assert (worst > 0) == (window > 1)
    old = Rollout((), (0,) * 3, (-1.0,) * 3, "", True, versions=(3, 3, 5))
    assert Step(0, [Group(0, "", 0.0, rollouts={0: old})]).staleness(7) == [4]  # of the oldest token


def test_extra_rollouts_go_first() -> None:
    order: list[tuple[int, bool]] = []

    class Watched(SimulatedEngine):
        def submit(self, requests) -> None:  # type: ignore[no-untyped-def]
            order.extend((request.number, request.urgent) for request in requests)
            super().submit(requests)

    engine = Watched(2, success, short)
    steps_of(scheduler(LookAhead(), limits(window=2), engine), 2)
    assert {urgent for _, urgent in order} == {True, False}
    engine = SimulatedEngine(1, success, Lengths({}))
    for number in (1, 2, 3):
        engine.submit([Request(number, "0", number, 1.0, 8, urgent=number == 3)])
    assert [engine.wait(LONG)[0].number for _ in range(3)] == [1, 3, 2]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_planned_is_asked_for_at_once_or_one_by_one(mode: str) -> None:
    most = 0

    class Watched(SimulatedEngine):
        def submit(self, requests) -> None:  # type: ignore[no-untyped-def]
            nonlocal most
            most = max(most, *Counter(request.prompt for request in requests if request.urgent).values(), 0)
            super().submit(requests)

    steps_of(scheduler(LookAhead(), limits(mode), Watched(8, success, short)), 2)
    assert (most == 1) == (mode in ("barrier", "async"))


def test_the_calibrated_rule_learns_from_finished_steps() -> None:
    rule = LookAhead(k_init=1, fusion="calibrated", cost=1 / 64)
    steps = steps_of(scheduler(rule, limits(prompts=40)), 3)
    check_whole(steps, 16)
    assert rule.state is not None
    assert torch.isfinite(rule.state).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "eager"}, "allowed: barrier, async, planned, stream"),
        ({"prompts": 0}, "prompts is 0; allowed: 1 or more"),
        ({"window": 0}, "window is 0"),
        ({"rollouts": 0}, "rollouts is 0"),
        ({"attempts": 0}, "attempts is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"poll": 0.0}, "poll is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
    ],
)
def test_limits_that_are_not_allowed(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits(**change)  # type: ignore[arg-type]
