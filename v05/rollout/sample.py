"""The groups of one update while they are being filled, behind a barrier."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v05.batch import Groups
from v05.rollout.engine import Rollout


@dataclass
class Sample:
    """The groups of one update while they are being filled; index g is the order in which prompts were started.

    Attributes:
        prompts: prompt texts.
        ids: positions in the task's stream.
        priors: expected rewards.
        rollouts: finished rollouts per prompt.
        rewards: their rewards.
        spent: rollouts generated, dropped ones included.
        dropped: rollouts dropped.
    """

    prompts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    priors: list[float] = field(default_factory=list)
    rollouts: list[list[Rollout]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    spent: int = 0
    dropped: int = 0

    @property
    def kept(self) -> int:
        """Return the rollouts that will be learnt from."""
        return self.spent - self.dropped

    def start(self, prompts: Sequence[str], ids: Sequence[int], prior: Tensor) -> None:
        """Add prompts without rollouts, with their expected rewards [n] float32."""
        self.prompts.extend(prompts)
        self.ids.extend(ids)
        self.priors.extend(prior.tolist())
        self.rollouts.extend([] for _ in prompts)
        self.rewards.extend([] for _ in prompts)

    def add(self, rollouts: Sequence[Sequence[Rollout]], rewards: Sequence[Sequence[float]]) -> None:
        """Append finished rollouts and their rewards to every prompt, in the order of `prompts`."""
        for group, (more, values) in enumerate(zip(rollouts, rewards, strict=True)):
            self.rollouts[group].extend(more)
            self.rewards[group].extend(values)
            self.spent += len(more)

    def drop(self, dropped: Tensor) -> None:
        """Remove the groups where `dropped` [G] bool is true; their rollouts stay spent."""
        stay = [group for group, gone in enumerate(dropped.tolist()) if not gone]
        self.dropped += sum(len(rewards) for rewards in self.rewards) - sum(len(self.rewards[group]) for group in stay)
        self.prompts = [self.prompts[group] for group in stay]
        self.ids = [self.ids[group] for group in stay]
        self.priors = [self.priors[group] for group in stay]
        self.rollouts = [self.rollouts[group] for group in stay]
        self.rewards = [self.rewards[group] for group in stay]

    @property
    def groups(self) -> Groups:
        """Return the groups as they are now."""
        return Groups.from_lists(self.prompts, self.ids, self.rewards)

    @property
    def prior(self) -> Tensor:
        """Return the expected rewards, [G] float32."""
        return torch.tensor(self.priors, dtype=torch.float32)


def first_rollouts(budget: int, k_init: int, expected_extra: float) -> list[int]:
    """Return the first rollouts of new prompts, keeping back what those prompts are expected to want later.

    Args:
        budget: rollouts there are, 0 or more.
        k_init: rollouts that a prompt starts with.
        expected_extra: rollouts that a prompt is expected to want after that, 0 or more.

    Returns:
        One number per new prompt, adding up to at most `budget`. Nothing is kept back once the budget is down to two
        prompts, and what is then left over (less than `k_init`) starts one prompt with fewer rollouts.
    """
    prompts = int(budget / (k_init + expected_extra))
    if prompts > 2:
        return [k_init] * prompts
    return [k_init] * (budget // k_init) + ([budget % k_init] if budget % k_init else [])
