"""V0.5 over plain Ray actors, without verl: prior, rollouts, look-ahead and advantages, the same as in one process."""

import os
import random
from pathlib import Path

import pytest
import ray
import torch

from v05.kernels import group_advantage, shrinkage
from v05.value.past import WithPast
from v05.value.prior import RunningMean

pytestmark = pytest.mark.verl
RANGE, ROOT = (-1.0, 1.0), Path(__file__).resolve().parents[2]
PROMPTS = [f"prompt {tenths}" for tenths in (0, 1, 5, 9, 10, 8, 3, 0, 10, 5)]


class Engine:
    """A sampler whose answer to a prompt's n-th rollout depends on nothing else, so that order does not matter."""

    def roll_out(self, prompt, step, numbers):
        """The rewards of these rollouts: right in as many of ten cases as the prompt says."""
        chance = int(prompt.split()[1]) / 10
        return [1.0 if random.Random(f"{prompt} {step} {n}").random() < chance else -1.0 for n in numbers]


class Expectation:
    """A prior of two parts, each prompt's own past over a running mean of all."""

    def __init__(self):
        self.prior = WithPast(RunningMean(RANGE), RANGE)

    def predict(self, prompts):
        """Expected rewards, [G]."""
        return self.prior.predict(prompts)

    def observe(self, prompts, means, counts):
        """Learn from finished groups."""
        self.prior.observe(prompts, means, counts)


def train_on(steps, predict, observe, roll_out):
    """The driver: what each step would train on, `(sizes, prior, advantages)`; who answers is the caller's matter."""
    seen = []
    for step in range(steps):
        prior, groups = predict(PROMPTS), [[] for _ in PROMPTS]
        wanted = torch.full((len(PROMPTS),), 4)
        while wanted.any():  # one-step look-ahead until every group stops
            ranges = [range(len(group), len(group) + more) for group, more in zip(groups, wanted.tolist(), strict=True)]
            for group, rewards in zip(groups, roll_out(PROMPTS, step, ranges), strict=True):
                group.extend(rewards)
            offsets = torch.tensor([0, *map(len, groups)]).cumsum(0)
            rewards = torch.tensor([reward for group in groups for reward in group])
            fused = shrinkage(rewards, offsets, prior, reward_range=RANGE)
            wanted = fused.planned - fused.count
        advantages = group_advantage(rewards, offsets, prior=prior, reward_range=RANGE)
        torch.testing.assert_close(advantages, rewards - fused.baseline.repeat_interleave(fused.count))
        observe(PROMPTS, fused.mean, fused.count)
        seen.append((fused.count, prior, advantages))
    return seen


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this process's own."""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "OMP_NUM_THREADS": "1"}
    ray.init(address="local", num_cpus=3, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


def test_actors_do_what_one_process_does(cluster):
    engines = [ray.remote(num_cpus=1)(Engine).remote() for _ in range(2)]
    expectation = ray.remote(num_cpus=1)(Expectation).remote()

    def over_actors(prompts, step, ranges):
        asked = [
            engines[place % 2].roll_out.remote(prompt, step, list(numbers))
            for place, (prompt, numbers) in enumerate(zip(prompts, ranges, strict=True))
        ]
        return ray.get(asked)

    remote = train_on(
        4,
        lambda prompts: ray.get(expectation.predict.remote(prompts)),
        lambda *outcome: ray.get(expectation.observe.remote(*outcome)),
        over_actors,
    )
    alone, engine = Expectation(), Engine()

    def here(prompts, step, ranges):
        return [engine.roll_out(prompt, step, numbers) for prompt, numbers in zip(prompts, ranges, strict=True)]

    local = train_on(4, alone.predict, alone.observe, here)
    assert max(int(sizes.max()) for sizes, _, _ in remote) > 4, "some group must have grown"
    assert min(int(sizes.min()) for sizes, _, _ in remote) == 4, "and some not"
    for theirs, ours in zip(remote, local, strict=True):
        for actors, process in zip(theirs, ours, strict=True):
            torch.testing.assert_close(actors, process, rtol=0, atol=0)
    first, last = remote[0][1], remote[-1][1]
    assert first.unique().numel() == 1, "nothing is known at first"
    assert last[0] < last[3], "the prior's actor has learnt which prompts fail"
