"""Budget rules against brute force and by hand; every one keeps to its total."""

import itertools
import random

import pytest
import torch

from v05.kernels import shrinkage
from v05.rollout.budget import Fixed, LookAhead, ReinforceAda, Utility, Variance, greedy, utility

PRIOR = torch.tensor([-0.9, -0.4, 0.0, 0.7])


def groups(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([value for row in rows for value in row]), torch.tensor([0, *map(len, rows)]).cumsum(0)


def best(total: int, smallest: int, largest: int, worth) -> float:  # type: ignore[no-untyped-def]
    """The largest worth of any way to divide `total` among four groups."""
    sizes = itertools.product(range(smallest, largest + 1), repeat=4)
    return max(sum(worth(g, size) for g, size in enumerate(row)) for row in sizes if sum(row) == total)


@pytest.mark.parametrize("total", [8, 13, 20])
def test_variance_is_the_integer_optimum(total: int) -> None:
    chance = ((PRIOR + 1) / 2).tolist()
    found = Variance(total / 4, smallest=1, largest=9).first(PRIOR).tolist()
    assert sum(found) == total

    def worth(group: int, size: int) -> float:
        return -chance[group] * (1 - chance[group]) / size

    assert sum(worth(g, size) for g, size in enumerate(found)) == pytest.approx(best(total, 1, 9, worth))
    assert found[2] == max(found)
    assert Variance(total / 4, (0.0, 1.0), smallest=1, largest=9).first((PRIOR + 1) / 2).tolist() == found
    assert Variance(4).gain(2, 0.25) == pytest.approx(0.25 * 0.75 * (1 / 2 - 1 / 3))


def test_utility_by_hand_and_greedily() -> None:
    assert utility(1, 0.3) == 0
    assert utility(2, 0.25) == pytest.approx(2 * 0.75 * 0.25)
    assert utility(3, 0.5) == pytest.approx(3 * 0.5 * 0.75)
    found = Utility(4).first(PRIOR).tolist()
    assert sum(found) == 16
    assert min(found) == 2
    chance = ((PRIOR + 1) / 2).tolist()
    expected = [2] * 4
    for _ in range(8):
        gains = [utility(size + 1, p) - utility(size, p) for size, p in zip(expected, chance, strict=True)]
        expected[gains.index(max(gains))] += 1
    assert found == expected
    assert Utility(1000).first(PRIOR).tolist() == [128] * 4
    assert Utility(128 / 49).first(torch.zeros(49)).sum() == 128  # though 128 / 49 * 49 is below it in floating point


def test_greedy_is_optimal_for_falling_gains_and_keeps_to_its_bounds() -> None:
    draw = random.Random(0)
    for _ in range(30):
        gains = [sorted((draw.random() for _ in range(5)), reverse=True) for _ in range(4)]

        def worth(group: int, size: int, gains: list[list[float]] = gains) -> float:
            return sum(gains[group][: size - 1])

        total = draw.randint(4, 20)
        found = greedy(4, total, 1, 5, lambda group, size, gains=gains: gains[group][size - 1]).tolist()
        assert sum(found) == total
        assert sum(worth(g, size) for g, size in enumerate(found)) == pytest.approx(best(total, 1, 5, worth))
    assert greedy(3, 100, 1, 5, lambda group, size: 1.0).tolist() == [5, 5, 5]
    assert greedy(3, 2, 1, 5, lambda group, size: 1.0).tolist() == [1, 1, 1]
    assert greedy(0, 9, 1, 5, lambda group, size: 1.0).tolist() == []


def test_the_look_ahead_asks_for_what_shrinkage_plans() -> None:
    rewards, offsets = groups([-1.0] * 4, [1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 1.0, -1.0])
    prior = torch.full((3,), 0.6)
    ask = LookAhead().more(rewards, offsets, prior)
    assert ask.more.tolist() == [12, 3, 0]
    assert torch.equal(ask.gain, shrinkage(rewards, offsets, prior).gain)
    assert LookAhead(k_init=2).first(prior).tolist() == [2, 2, 2]


def test_the_calibrated_look_ahead_carries_its_mixture() -> None:
    rule = LookAhead(fusion="calibrated")
    rewards, offsets = groups(*[[-1.0] * 4] * 20)
    before = rule.more(rewards, offsets, torch.full((20,), 0.8)).more
    rule.learn(rewards, offsets, torch.full((20,), 0.8))
    assert rule.state is not None
    alone, offsets = groups([1.0, -1.0, -1.0, -1.0])
    fresh = LookAhead(fusion="calibrated").more(alone, offsets, torch.tensor([0.8]))
    assert not torch.equal(rule.more(alone, offsets, torch.tensor([0.8])).gain, fresh.gain)
    assert before.shape == (20,)


def test_reinforce_ada_goes_on_until_both_outcomes_are_there() -> None:
    rewards, offsets = groups([1.0] * 4, [1.0, -1.0, -1.0, -1.0], [-1.0] * 14, [-1.0] * 16)
    prior = torch.zeros(4)
    assert ReinforceAda().more(rewards, offsets, prior).more.tolist() == [4, 0, 2, 0]
    assert ReinforceAda().more(rewards, offsets, prior).gain.tolist() == pytest.approx([1 / 4, 0, 1 / 14, 1 / 16])
    assert ReinforceAda(each=2).more(rewards, offsets, prior).more.tolist() == [4, 4, 2, 0]
    zero_one = ReinforceAda(reward_range=(0.0, 1.0)).more(*groups([0.0, 1.0], [0.0, 0.0]), prior[:2])
    assert zero_one.more.tolist() == [0, 4]
    positive = ReinforceAda(positive=True).more(rewards, offsets, prior)
    assert positive.more.tolist() == [0, 0, 2, 0]  # one success ends it


def test_rules_that_never_grow() -> None:
    rewards, offsets = groups([-1.0] * 4, [1.0] * 4)
    for rule in (Fixed(4), Utility(4.0), Variance(4.0)):
        assert rule.more(rewards, offsets, torch.tensor([1.0, -1.0])).more.tolist() == [0, 0]
    assert Fixed(3).first(PRIOR).tolist() == [3] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "rollouts is 0; allowed: 1 or more"),
        (lambda: LookAhead(k_init=5, k_max=4), "k_max is 4; allowed: 5 or more"),
        (lambda: LookAhead(k_max=2**31), "k_max is 2147483648; allowed: 2147483647 or less"),
        (lambda: Utility(4, smallest=3, largest=2), "largest is 2; allowed: 3 or more"),
        (lambda: ReinforceAda(round=0), "round is 0"),
    ],
)
def test_sizes_that_are_not_allowed(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
