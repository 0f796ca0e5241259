"""The streaming scheduler over engines that fail: nothing is lost or counted twice whatever happens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulated_rollouts import (
    LONG,
    Faulty,
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
from v05.rollout.budget import LookAhead
from v05.rollout.engine import Rollout
from v05.rollout.limits import MODES
from v05.rollout.requests import Requests
from v05.rollout.scheduler import NoRollouts, Scheduler
from v05.rollout.simulated import SimulatedEngine
from v05.rollout.step import Group, Step
from v05.rollout.streaming import EngineDied, Outcome

FAULTS = {"error": 0.1, "garbage": 0.1, "twice": 0.1, "stranger": 0.05, "silent": 0.05, "late": 0.05, "dies": 0.03}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", ["barrier", "stream"])
def test_faults_change_nothing_but_the_counts(fault: str, mode: str) -> None:
    clean = rewards_of(steps_of(scheduler(LookAhead(), limits(mode)), 6))
    engine = Faulty(SimulatedEngine(8, success, short), {fault: FAULTS[fault]}, seed=3)
    patience = 500 if fault in ("silent", "late") else LONG
    made = scheduler(LookAhead(), limits(mode, attempts=50, restarts=1, seconds=patience), engine)  # type: ignore[arg-type]
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
        assert made.trouble.restarts == engine.deaths > made.limits.restarts  # but never so often in a row
    assert len(engine.taken_back) == made.trouble.timed_out


def test_answers_to_another_prompt_than_the_group_s_first_are_asked_for_again() -> None:
    class Odd(SimulatedEngine):
        def wait(self, timeout: float) -> list[Outcome]:
            return [replace(each, rollout=spoil(each)) if each.number == 2 else each for each in super().wait(timeout)]

    def spoil(outcome: Outcome) -> Rollout:
        assert outcome.rollout is not None
        return replace(outcome.rollout, prompt_ids=(2,))

    found = []
    for kind in (SimulatedEngine, Odd):
        made = scheduler(LookAhead(), limits(), kind(8, success, lambda draw: 1))
        made.encode = None
        found.append(rewards_of(steps_of(made, 2)))
    assert found[0] == found[1]
    assert made.trouble.garbage == 1


def test_what_never_comes_is_given_up_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class OneFails(SimulatedEngine):
        def wait(self, timeout: float) -> list[Outcome]:
            return [
                Outcome(each.number, None, "too long") if each.number in failing else each
                for each in super().wait(timeout)
            ]

        def submit(self, requests) -> None:  # type: ignore[no-untyped-def]
            failing.update({request.number: request.urgent for request in requests if request.prompt == "4"})
            super().submit(requests)

    failing: dict[int, bool] = {}
    made = scheduler(LookAhead(), limits(attempts=3, window=1, rollouts=26), OneFails(8, success, short))
    step = made.next_step()
    assert step is not None
    assert step.outcome.counts[4] == 0
    assert (step.outcome.counts[[0, 1, 2, 3, 5]] >= 4).all()
    assert step.outcome.counts.sum() == 26  # others have what it leaves
    assert step.groups[4].given_up == 4
    assert list(failing.values()) == [False] * 4 + [True] * 8
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
    assert made.requests.stray(1) == "late"  # should the engine that died have answered after all


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
    made = scheduler(LookAhead(), limits(restarts=6), engine)  # type: ignore[arg-type]
    clean = steps_of(scheduler(LookAhead(), limits()), 3)
    first = steps_of(made, 1)
    engine.faults = {"dies": 0.3}
    asked = dict(seed=5, temperature=1.0, max_new_tokens=4)
    for _ in range(20):
        assert made.revived.generate(["a", "b"], [2, 1], **asked) == [["a 5", "a 5"], ["b 5"]]  # type: ignore[arg-type]
    assert engine.deaths > made.limits.restarts  # but never so often in a row
    engine.faults = {}
    assert rewards_of(first + steps_of(made, 2)) == rewards_of(clean)


def test_what_is_asked_for_and_what_answers_it() -> None:
    book = Requests(limits(max_new_tokens=2, temperature=0.7), 0, lambda: 0.0)
    request = book.new(Step(0, []), Group(0, "1", 0.0), 0, urgent=False)
    assert (request.temperature, request.max_new_tokens) == (0.7, 2)
    again = book.again(book.waiting[1])
    assert again == replace(request, number=2, urgent=True)
    assert book.waiting[book.renumbered(book.waiting[2]).number].attempt == book.waiting[2].attempt == 2
    rounded = Rollout((1,), (0, 0), (-1.0, 5e-5), "1", True)
    assert book.fault(book.waiting[2], rounded) == ""
    for change, message in (
        ({"text": None}, "its text is a NoneType"),
        ({"logprobs": (-1.0, 2e-4)}, "above 0"),
        ({"versions": (1,)}, "2 log-probs and 1 versions"),
    ):
        assert message in book.fault(book.waiting[2], replace(rounded, **change))  # type: ignore[arg-type]


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
