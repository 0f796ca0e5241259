"""One prompt's look-ahead, and the memory of priors, without Ray."""

import asyncio
import logging
import re

import pytest
import torch

from v05.integrations.verl.look_ahead import grow, more
from v05.integrations.verl.memory import Memory
from v05.integrations.verl.settings import Settings
from v05.kernels import shrinkage

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
    assert memory.start("a", "easy") == (0.0, None)
    for _ in range(6):  # it measures how far a prompt's past can be trusted
        memory.finish("easy", [1.0] * 8)
        memory.finish("hard", [-1.0] * 8)
    later, _ = memory.start("b", "easy")
    assert later > 0.5
    assert memory.start("d", "hard")[0] < -0.5
    assert memory.recall(["b", "a"]) == [later, 0.0]
    with pytest.raises(ValueError, match=r"no prior under uid 'c' \(1 of 2 uids unknown\)"):
        memory.recall(["a", "c"])
    with pytest.raises(ValueError, match=r"algorithm.v05.memory is 'nothing'"):
        Memory(Settings(memory="nothing"))


class Lengths:
    """A prior of one's own as TRL takes it: asked with prompts, and nothing else."""

    def __init__(self, reward_range):
        self.low, self.high = reward_range

    def predict(self, prompts):
        """Longer prompts are harder."""
        return [max(self.low, self.high - len(prompt) / 10) for prompt in prompts]


def test_a_prior_of_ones_own_is_asked_with_prompts():
    memory = Memory(Settings(reward_range=(-1.0, 1.0), memory=f"{__name__}.Lengths"))
    assert memory.start("a", "12345") == (0.5, None)
    memory.finish("12345", [1.0, -1.0])
    assert memory.recall(["a"]) == [0.5]
    again = Memory(Settings(reward_range=(-1.0, 1.0), memory=f"{__name__}.Lengths"))
    again.load_state_dict(memory.state_dict())
    assert again.recall(["a"]) == [0.5]


def test_the_look_ahead_fuses_as_the_estimator_does():
    section = {"reward_range": [-1, 1]}
    assert Settings.of({"adv_estimator": "v05", "v05": section}).fusion == "v05"
    assert Settings.of({"adv_estimator": "v05_calibrated_loo", "v05": section}).fusion == "calibrated"
    assert Settings.of({"adv_estimator": "v05", "v05": {**section, "fusion": "calibrated"}}).fusion == "calibrated"
    assert Settings.of(None).fusion == "v05"
    with pytest.raises(ValueError, match=r"algorithm.v05.fusion is 'best'; allowed: v05, calibrated"):
        Settings.of({"v05": {"fusion": "best"}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(k_init="many"), "algorithm.v05.k_init is 'many'; allowed: a whole number"),
        (dict(k_init=2.5), "algorithm.v05.k_init is 2.5; allowed: a whole number"),
        (dict(k_init=True), "algorithm.v05.k_init is True; allowed: a whole number"),
        (dict(k_init=20), "algorithm.v05: k_init is 20 and k_max 16; allowed: 1 <= k_init <= k_max"),
        (dict(k_max=-3), "algorithm.v05: k_init is 4 and k_max -3"),
        (dict(k_max=2**31), "algorithm.v05: k_max is 2147483648; allowed: 2147483647 or less"),
        (dict(cost=-1), "algorithm.v05: cost is -1; allowed: a finite number, 0 or above"),
        (dict(cost="dear"), "algorithm.v05.cost is 'dear'; allowed: a number"),
        (dict(reward_range=[0, 1e-20]), "algorithm.v05: reward_range is"),
        (dict(scale="std"), "algorithm.v05: scale is 'std'; allowed: 'none', 'group', 'batch', 'baseline'"),
        (dict(fusion="best"), "algorithm.v05.fusion is 'best'; allowed: v05, calibrated"),
        (dict(prior=3), "algorithm.v05.prior is 3; allowed: a full name"),
        (dict(memory=None), "algorithm.v05.memory is None; allowed: a full name"),
    ],
)
def test_settings_are_checked_before_anything_runs(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.of({"adv_estimator": "v05", "v05": given})


def test_a_scale_against_the_estimator_is_found_too():
    with pytest.raises(ValueError, match=r"algorithm.v05: scale is 'batch' but grpo is defined with 'group'"):
        Settings.of({"adv_estimator": "v05_grpo", "v05": {"scale": "batch"}})
    assert Settings.of({"adv_estimator": "grpo", "v05": {"scale": "batch"}}).scale == "batch", "verl's own"
    assert Settings.of({"adv_estimator": "v05_loo", "v05": {"scale": "batch"}}).scale == "batch"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(memory="nope"), "algorithm.v05.memory is 'nope'"),
        (dict(memory="math.pi"), "algorithm.v05.memory is 'math.pi', which cannot be called"),
        (dict(prior="nope.Mine"), "algorithm.v05.prior is 'nope.Mine'"),
        (dict(prior="fractions.Fraction"), "algorithm.v05.prior is 'fractions.Fraction', which has no predict"),
    ],
)
def test_names_are_looked_up_before_anything_runs(given, message):
    settings = Settings.of({"adv_estimator": "v05", "v05": given})
    with pytest.raises(ValueError, match=re.escape(message)):
        settings.find_names()
    Settings().find_names()


def test_calibrated_numbers():
    """Where outcomes have been as expected so far, four failures in a row are more of a surprise."""
    settings = Settings(reward_range=(-1.0, 1.0), fusion="calibrated")
    rewards, offsets = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0] * 40), torch.arange(0, 201, 5)
    known = shrinkage(rewards, offsets, torch.full((40,), 0.6), reward_range=(-1.0, 1.0), fusion="calibrated").state
    wanted = []
    for mixture in (None, known):
        assert more([], 0.6, settings, mixture) == 4
        values = torch.tensor([-1.0] * 2 + [1.0] * 2, dtype=torch.float64)
        options = dict(reward_range=(-1.0, 1.0), fusion="calibrated", state=mixture)
        test = shrinkage(values, torch.tensor([0, 4]), torch.tensor([0.6], dtype=torch.float64), **options)
        assert more(values.tolist(), 0.6, settings, mixture) == int(test.planned - test.count)
        wanted.append(int(test.planned - test.count))
    assert wanted[0] != wanted[1], "the state matters"
    assert more([-1.0] * 4, 0.6, SETTINGS, known) == 12, "the paper's rule has no state"


def test_memory_goes_on_from_what_it_knew(caplog):
    memory, again = Memory(SETTINGS), Memory(SETTINGS)
    for prompt, reward in (("easy", 1.0), ("hard", -1.0)) * 3:
        memory.start(f"{prompt}-{reward}", prompt)
        memory.finish(prompt, [reward] * 8)
    memory.learn(torch.arange(3.0))
    again.load_state_dict(memory.state_dict())
    uids = ["easy-1.0", "hard--1.0"]
    assert again.recall(uids) == memory.recall(uids)
    expected, mixture = again.start("c", "easy")
    assert expected == memory.start("c", "easy")[0] != 0.0
    assert mixture.tolist() == [0.0, 1.0, 2.0]
    other = Memory(Settings(reward_range=(-1.0, 1.0), memory="v05.value.prior.RunningMean"))
    with caplog.at_level(logging.WARNING):
        other.load_state_dict(memory.state_dict())
    assert "holds the state of prior WithPast, not of RunningMean, which starts anew" in caplog.text
    assert other.start("d", "easy") == (0.0, None)
    fresh = Memory(SETTINGS)
    fresh.load_state_dict(Memory(SETTINGS).state_dict())
    assert fresh.start("a", "easy") == (0.0, None)
