"""The streaming scheduler's caps: on rollouts and tokens of a step, on those of a run, and rules by prompt."""

import pytest
import torch

from tests.simulated_rollouts import Faulty, check_whole, limits, scheduler, short, steps_of, success
from v05.kernels import shrinkage
from v05.rollout.budget import LookAhead
from v05.rollout.limits import MODES
from v05.rollout.simulated import SimulatedEngine


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


@pytest.mark.parametrize(("rollouts", "most"), [(None, 30), (27, 27), (40, 30)])
def test_a_cap_on_tokens_keeps_growth_under_it(rollouts: int | None, most: int) -> None:
    """Every answer is 5 tokens long, so that the expectation is exact: 24 first ones, then at most 6 more."""
    engine = SimulatedEngine(8, success, lambda draw: 5)
    steps = steps_of(scheduler(LookAhead(), limits(tokens=150, rollouts=rollouts), engine), 4)
    assert max(step.tokens for step in steps) == 5 * most
    assert all(step.tokens == 5 * int(step.outcome.counts.sum()) for step in steps)


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
