"""What the trainer asks of a prior, and the simplest one: a running mean."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Prior(Protocol):
    """Predicts the expected reward of a prompt under the current policy."""

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the expected reward of each prompt, [G] float32, inside the reward range."""
        ...

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Learn from outcomes of the current policy: mean rewards [G] float32 over `counts` [G] int64 rollouts."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that the next prediction depends on."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned."""
        ...


class RunningMean:
    """One expected reward for all prompts: the mean of past rewards, forgetting by rollout."""

    def __init__(self, reward_range: tuple[float, float], half_life: float = 512.0) -> None:
        """Start in the middle of the reward range.

        Args:
            reward_range: smallest and largest reward.
            half_life: after this many rollouts an old one counts half.

        Raises:
            ValueError: `half_life` is not above 0.
        """
        if not half_life > 0:
            raise ValueError(f"half_life is {half_life}; allowed: above 0")
        self.half_life = half_life
        middle = (reward_range[0] + reward_range[1]) / 2
        self.total = torch.tensor([middle, 1.0], dtype=torch.float64)  # decayed sum of rewards and of rollouts

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the running mean once per prompt, [G] float32."""
        return (self.total[0] / self.total[1]).float().expand(len(prompts)).clone()

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Add the outcomes of a batch.

        Args:
            prompts: G prompts; not looked at.
            means: mean rewards [G] float.
            counts: rollouts behind each mean, [G] int64; 0 leaves the prompt out.
        """
        seen = counts > 0
        rewards = (means[seen].double() * counts[seen]).sum()
        rollouts = counts.sum().double()
        self.total = self.total * 0.5 ** (rollouts / self.half_life) + torch.stack([rewards, rollouts])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the decayed sums, {"total": [2] float64}."""
        return {"total": self.total.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.total = state["total"].clone()


class Middle:
    """No knowledge at all: the middle of the reward range for every prompt, whatever is observed."""

    def __init__(self, reward_range: tuple[float, float]) -> None:
        """Take the reward range."""
        self.value = sum(reward_range) / 2

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the middle once per prompt, [G] float32."""
        return torch.full((len(prompts),), self.value)

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take no state."""
