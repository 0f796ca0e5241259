"""One prompt's look-ahead, and the memory of priors, without Ray."""

import asyncio

import pytest

from v05.integrations.verl.look_ahead import grow, more
from v05.integrations.verl.memory import Memory
from v05.integrations.verl.settings import Settings

pytestmark = pytest.mark.verl
SETTINGS = Settings(reward_range=(-1.0, 1.0))


@pytest.mark.parametrize(
    ("rewards", "wanted"), [([], 4), ([-1] * 4, 12), ([1, 1, -1, -1], 3), ([1, 1, 1, -1], 0), ([-1] * 16, 0)]
)
def test_worked_numbers(rewards, wanted):
    """Prior 0.6, as in the paper's rule by hand: four failures want all, three successes of four nothing."""
    assert more(rewards, 0.6, SETTINGS) == wanted


def test_a_prompt_grows_until_the_test_is_content():
    asked = []

    async def roll_out(numbers):
        asked.append(list(numbers))
        return [1.0 if number in (0, 1, 4, 5, 6) else -1.0 for number in numbers]

    rewards = asyncio.run(grow(roll_out, 0.6, SETTINGS))
    assert asked == [[0, 1, 2, 3], [4, 5, 6]], "two of four want three more; five of seven are what was expected"
    assert sum(rewards) == 3


def test_memory_learns_and_recalls_what_it_had_said():
    memory = Memory(SETTINGS)
    assert memory.start("a", "easy") == 0.0
    for _ in range(6):  # it measures how far a prompt's past can be trusted
        memory.finish("easy", [1.0] * 8)
        memory.finish("hard", [-1.0] * 8)
    later = memory.start("b", "easy")
    assert later > 0.5
    assert memory.start("d", "hard") < -0.5
    assert memory.recall(["b", "a"]) == [later, 0.0]
    with pytest.raises(ValueError, match=r"no prior under uid 'c' \(1 of 2 uids unknown\)"):
        memory.recall(["a", "c"])
    with pytest.raises(ValueError, match=r"algorithm.v05.memory is 'nothing'"):
        Memory(Settings(memory="nothing"))
