"""The streaming scheduler: by hand on small schedules, and that nothing is lost or counted twice whatever happens."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulated_rollouts import Faulty, Signs, go_on, scheduler, short, source, success
from v05.kernels import shrinkage
from v05.rollout.budget import Fixed, LookAhead
from v05.rollout.limits import MODES, Limits
from v05.rollout.scheduler import NoRollouts, Scheduler
from v05.rollout.simulated import SimulatedEngine
from v05.rollout.step import Step
from v05.rollout.streaming import EngineDied, Outcome, Request
from v05.seeds import seed_of

LONG = 1e9


def limits(mode: str = "stream", **changes: object) -> Limits:
    return Limits(**{"prompts": 6, "mode": mode, "max_new_tokens": 64, "seconds": LONG, "poll": LONG, **changes})  # type: ignore[arg-type]


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
@pytest.mark.parametrize("cap", [24, 27, 40])
def test_a_cap_on_rollouts_is_never_passed_and_goes_to_the_largest_gains(mode: str, cap: int) -> None:
    steps = steps_of(scheduler(LookAhead(), limits(mode, rollouts=cap)), 4)
    check_whole(steps, 16)
    spent = [sum(group.requested for group in step.groups) for step in steps]
    assert max(spent) <= cap
    if cap == 24:
        assert spent == [24] * 4
    free = steps_of(scheduler(LookAhead(), limits(mode)), 4)
    assert any(sum(group.requested for group in step.groups) > cap for step in free) == (cap < 40 or max(spent) == cap)


def test_a_cap_below_the_first_rollouts_starts_fewer_prompts() -> None:
    steps = steps_of(scheduler(LookAhead(), limits(rollouts=10)), 3)
    check_whole(steps, 16)
    assert [step.outcome.counts.tolist() for step in steps] == [[4, 4, 2]] * 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("total", [1, 30, 100, 101])
def test_a_run_spends_what_it_has_and_no_more(mode: str, total: int) -> None:
    """Calls whose answers are refused now and then count for nothing, as in `given_up`."""
    engine = Faulty(SimulatedEngine(8, success, short), {"error": 0.1}, seed=1)
    made = scheduler(LookAhead(), limits(mode, rollouts=30, attempts=1), engine)  # type: ignore[arg-type]
    steps, spent = [], 0
    while spent < total:
        step = made.next_step(left=total - spent)
        assert step is not None
        steps.append(step)
        spent += sum(len(group.rewards) for group in step.groups)
    check_whole(steps, 16)
    assert spent == total
    assert made.steps == []
    assert sum(group.requested for step in steps for group in step.groups) == total + made.trouble.given_up


def test_a_cap_on_tokens_stops_growth() -> None:
    free = steps_of(scheduler(LookAhead(), limits("planned")), 3)
    few = steps_of(scheduler(LookAhead(), limits("planned", tokens=1)), 3)
    assert all(step.extra == 0 for step in few)
    assert any(step.extra > 0 for step in free)


def test_the_calibrated_rule_learns_from_finished_steps() -> None:
    rule = LookAhead(k_init=1, fusion="calibrated", cost=1 / 64)
    steps = steps_of(scheduler(rule, limits(prompts=40)), 3)
    check_whole(steps, 16)
    assert rule.state is not None
    assert torch.isfinite(rule.state).all()


FAULTS = {"error": 0.1, "garbage": 0.1, "twice": 0.1, "stranger": 0.05, "silent": 0.05, "late": 0.05, "dies": 0.01}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["barrier", "stream"])
def test_faults_change_nothing_but_the_counts(fault: str, mode: str) -> None:
    clean = rewards_of(steps_of(scheduler(LookAhead(), limits(mode)), 6))
    engine = Faulty(SimulatedEngine(8, success, short), {fault: FAULTS[fault]}, seed=3)
    patience = 500 if fault in ("silent", "late") else LONG
    made = scheduler(LookAhead(), limits(mode, attempts=50, restarts=50, seconds=patience), engine)  # type: ignore[arg-type]
    steps = steps_of(made, 6)
    check_whole(steps, 16)
    assert rewards_of(steps) == clean
    counts = made.trouble.counts()
    seen = {"error": "failed", "twice": "duplicates", "stranger": "unknown", "silent": "timed_out", "dies": "restarts"}
    assert counts.pop({**seen, "late": "late"}.get(fault, fault)) > 0
    if fault == "late":
        assert counts.pop("timed_out") > 0
    resubmitted = counts.pop("resubmitted")
    assert (resubmitted > 0) == (fault not in ("twice", "stranger"))
    assert not any(counts.values())
    if fault == "dies":
        assert made.trouble.restarts == engine.deaths


def test_what_never_comes_is_given_up_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class OneFails(SimulatedEngine):
        def wait(self, timeout: float) -> list[Outcome]:
            return [
                Outcome(each.number, None, "too long") if each.number in failing else each
                for each in super().wait(timeout)
            ]

        def submit(self, requests) -> None:  # type: ignore[no-untyped-def]
            failing.update(request.number for request in requests if request.prompt == "4")
            super().submit(requests)

    failing: set[int] = set()
    made = scheduler(LookAhead(), limits(attempts=3, window=1), OneFails(8, success, short))
    step = made.next_step()
    assert step is not None
    assert step.outcome.counts[4] == 0
    assert (step.outcome.counts[[0, 1, 2, 3, 5]] >= 4).all()
    assert step.groups[4].given_up == 4
    assert step.lost == ["'4': too long"] * 4
    assert [record.getMessage() for record in caplog.records] == [
        f"rollout {place} of prompt '4' is given up: too long" for place in range(4)
    ]
    assert (made.trouble.failed, made.trouble.resubmitted, made.trouble.given_up) == (12, 8, 4)


def test_a_step_without_any_rollout_is_an_error() -> None:
    engine = Faulty(SimulatedEngine(8, success, short), {"error": 1.0})
    with pytest.raises(NoRollouts, match="step 0: no rollout came for any of its prompts; last: '5': out of memory"):
        scheduler(LookAhead(), limits(attempts=2), engine).next_step()  # type: ignore[arg-type]


def test_an_engine_that_keeps_dying_is_reported() -> None:
    engine = Faulty(SimulatedEngine(8, success, short), {"dies": 1.0})
    with pytest.raises(EngineDied, match="3 times without a finished rollout"):
        scheduler(LookAhead(), limits(restarts=2), engine).next_step()  # type: ignore[arg-type]


def test_a_restarted_engine_gets_the_weights_again() -> None:
    engine = Faulty(SimulatedEngine(8, success, short), {})
    made = scheduler(LookAhead(), limits(window=1), engine)  # type: ignore[arg-type]
    made.push({"w": torch.ones(1)}, 7)
    engine.faults = {"dies": 1.0}
    with pytest.raises(EngineDied):
        made.next_step()
    assert engine.pushed == [7] * (1 + made.limits.restarts)


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


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    faults=st.fixed_dictionaries({fault: st.floats(0, 0.3) for fault in FAULTS if fault != "dies"}),
    dies=st.floats(0, 0.05),
    slots=st.integers(1, 20),
    window=st.integers(1, 5),
    prompts=st.integers(1, 9),
    cap=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**31),
)
def test_nothing_is_lost_or_counted_twice(mode, faults, dies, slots, window, prompts, cap, seed) -> None:  # type: ignore[no-untyped-def]
    engine = Faulty(SimulatedEngine(slots, success, short), {**faults, "dies": dies}, seed)
    bounds = dict(prompts=prompts, window=window, rollouts=cap, attempts=2, restarts=10**6, seconds=300)
    made = scheduler(LookAhead(), limits(mode, **bounds), engine)  # type: ignore[arg-type]
    try:
        steps = steps_of(made, 3)
    except NoRollouts:
        assert made.trouble.given_up >= min(4, cap or 4)
        return
    check_whole(steps, 16)
    if cap is not None:
        assert all(sum(group.requested - group.given_up for group in step.groups) <= cap for step in steps)
    pending = [group for step in made.steps for group in step.groups]
    assert sum(group.waiting for group in pending) == len(made.requests.waiting) + len(made.judged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "eager"}, "allowed: barrier, async, planned, stream"),
        ({"prompts": 0}, "prompts is 0; allowed: 1 or more"),
        ({"window": 0}, "window is 0"),
        ({"rollouts": 0}, "rollouts is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
    ],
)
def test_limits_that_are_not_allowed(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["planned", "stream"])
def test_a_cap_that_binds_goes_to_the_largest_gains_of_the_whole_step(mode: str) -> None:
    refused = 0
    for step in steps_of(scheduler(LookAhead(), limits(mode, prompts=24, rollouts=24 * 4 + 12)), 4):
        rewards = [[group.rewards[place] for place in range(4)] for group in step.groups]
        offsets = torch.arange(0, 4 * len(rewards) + 1, 4)
        first = shrinkage(torch.tensor(rewards).flatten(), offsets, step.prior)
        grown = torch.tensor([group.requested > 4 for group in step.groups])
        assert not (grown & ~first.roll_out_more).any()
        without = first.roll_out_more & ~grown
        refused += int(without.sum())
        if without.any():
            assert first.gain[grown].min() >= first.gain[without].max()
            assert sum(group.requested for group in step.groups) == 24 * 4 + 12
    assert refused > 0


def test_a_cap_on_tokens_keeps_growth_under_it() -> None:
    """Every answer is 5 tokens long, so that the expectation is exact: 24 first ones, then at most 6 more."""
    engine = SimulatedEngine(8, success, lambda draw: 5)
    steps = steps_of(scheduler(LookAhead(), limits(tokens=150), engine), 4)
    assert max(step.tokens for step in steps) == 150
    assert all(step.tokens == 5 * int(step.outcome.counts.sum()) for step in steps)


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


def test_a_request_is_not_late_because_nobody_looked() -> None:
    """Learning and evaluation between two steps may take longer than an answer is allowed to."""
    engine, away = SimulatedEngine(8, success, short), [0.0]
    made = Scheduler(engine, source, Signs(), LookAhead(), limits(seconds=2000), 0, lambda: engine.now + away[0])
    for version in range(5):
        assert made.next_step() is not None
        assert made.requests.waiting
        made.push({}, version + 1)
        away[0] += 10_000
    assert (made.trouble.timed_out, made.trouble.resubmitted, made.trouble.given_up) == (0, 0, 0)


def test_requests_that_were_taken_back_are_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v05.rollout.requests.REMEMBERED", 4)
    engine = Faulty(SimulatedEngine(8, success, short), {"silent": 1.0})
    made = scheduler(LookAhead(), limits(seconds=50.0, window=1, attempts=2), engine)  # type: ignore[arg-type]
    with pytest.raises(NoRollouts):
        made.next_step()
    book = made.requests
    assert len(book.withdrawn) <= 4
    assert book.stray(max(book.withdrawn)) == "late"
    assert book.stray(1) == "duplicates"


def test_a_batch_beside_the_requests_outlives_the_engine() -> None:
    class Batches(Faulty):
        def generate(self, prompts, counts, *, seed, temperature, max_new_tokens):  # type: ignore[no-untyped-def]
            if self._happens("dies"):
                self._die()
            return [[f"{prompt} {seed}"] * count for prompt, count in zip(prompts, counts, strict=True)]

    engine = Batches(SimulatedEngine(8, success, short), {})
    made = scheduler(LookAhead(), limits(restarts=99), engine)  # type: ignore[arg-type]
    clean = steps_of(scheduler(LookAhead(), limits()), 3)
    first = steps_of(made, 1)
    engine.faults = {"dies": 0.5}
    asked = dict(seed=5, temperature=1.0, max_new_tokens=4)
    for _ in range(8):
        assert made.revived.generate(["a", "b"], [2, 1], **asked) == [["a 5", "a 5"], ["b 5"]]  # type: ignore[arg-type]
    assert engine.deaths > 0
    engine.faults = {}
    assert rewards_of(first + steps_of(made, 2)) == rewards_of(clean)


class Slow(Signs):
    """Judges when asked to wait only."""

    def ready(self, ticket: int) -> bool:
        return False


def test_a_stop_waits_for_what_is_being_judged() -> None:
    made, looks = scheduler(LookAhead(), limits()), iter(range(10**6))
    made.judge = Slow()
    assert made.next_step(lambda: next(looks) >= 10) is None
    kept = sum(len(group.rewards) for step in made.steps for group in step.groups)
    assert kept == len(made.judge.asked) > 0  # type: ignore[attr-defined]
    again = scheduler(LookAhead(), limits())
    go_on(made, again)
    check_whole(steps_of(again, 3), 16)


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
    engine = Faulty(SimulatedEngine(8, success, short), {"silent": 1.0})
    made = scheduler(LookAhead(), limits(poll=5.0), engine)  # type: ignore[arg-type]
    made.next_step(lambda: engine.clock() > 20)
    assert 20 < engine.clock() <= 25 + 40


@pytest.mark.parametrize("reward", [float("nan"), 1.5, float("-inf")])
def test_a_reward_outside_the_range_loses_its_rollout_alone(reward: float) -> None:
    class Odd(Signs):
        odd = 0

        def submit(self, prompt: str, text: str, finished: bool) -> int:
            ticket = super().submit(prompt, text, finished)
            self.odd = self.odd or max(0, ticket)
            return ticket

        def collect(self, tickets):  # type: ignore[no-untyped-def]
            got = super().collect(tickets)
            return [reward if ticket == self.odd else value for ticket, value in zip(tickets, got, strict=True)]

    made = scheduler(LookAhead(), limits())
    made.judge = Odd()
    steps = steps_of(made, 3)
    check_whole(steps, 16)
    assert made.trouble.bad_rewards == made.trouble.given_up == sum(len(step.lost) for step in steps) == 1
    assert all(-1 <= value <= 1 for step in steps for value in step.outcome.rewards.tolist())


def test_prompts_may_have_sizes_and_prices_of_their_own() -> None:
    calls: list[int] = []

    class Counted(LookAhead):
        def more(self, rewards, offsets, prior):  # type: ignore[no-untyped-def]
            calls.append(len(prior))
            return super().more(rewards, offsets, prior)

    rules = (Counted(2, 6), Counted(4, 16, cost=1.0))
    made = scheduler(rules[0], limits("barrier"))
    made.rules.rule_of = lambda prompt: rules[int(prompt) % 2]
    steps = steps_of(made, 4)
    check_whole(steps, 16)
    sizes = [
        [group.requested for step in steps for group in step.groups if group.position % 2 == odd] for odd in (0, 1)
    ]
    assert set(sizes[1]) == {4}  # a rollout costs more than it can gain
    assert min(sizes[0]) == 2
    assert 2 < max(sizes[0]) <= 6
    assert calls.count(3) >= 4  # one call for all of a step that go by the same rule


def test_the_counts_survive_a_stop() -> None:
    engine = Faulty(SimulatedEngine(8, success, short), {"error": 0.3})
    made = scheduler(LookAhead(), limits(), engine)  # type: ignore[arg-type]
    steps_of(made, 2)
    again = scheduler(LookAhead(), limits())
    go_on(made, again)
    assert again.trouble.counts() == made.trouble.counts()
    assert made.trouble.failed > 0
    lost = [list(group.lost.items()) for step in made.steps for group in step.groups]
    assert [list(group.lost.items()) for step in again.steps for group in step.groups] == lost
