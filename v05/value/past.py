"""A prompt's own past, corrected for the policy's drift, and mixed with another prior by measured reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from v05.value.memory import below, forget_oldest, pack_text, under, unpack_text
from v05.value.prior import Prior

LEVEL_HALF_LIFE: Final = 256.0  # rollouts after which an outcome counts half in the policy's level
RELIABILITY_HALF_LIFE: Final = 2048.0  # rollouts after which a measured error counts half
CAUTION: Final = 4.0  # rollouts' worth of evidence against trusting the past, before there is any


class WithPast:
    """Another prior, except where a prompt was met before: there both are mixed.

    A prompt's past is its last mean reward plus what the policy's overall level has gained since. With the gap
    between past and prior and the miss of the prior on the same outcome, the share of the past is the slope of misses
    on gaps, summed with forgetting and kept inside [0, 1]: the mixture with the least squared error so far.
    """

    def __init__(self, prior: Prior, reward_range: tuple[float, float], memory: int = 65_536) -> None:
        """Wrap `prior`.

        Args:
            prior: predicts every prompt, met or not.
            reward_range: smallest and largest reward.
            memory: prompts remembered at most; the ones met longest ago go first.

        Raises:
            ValueError: `memory` is not above 0.
        """
        if memory < 1:
            raise ValueError(f"memory is {memory}; allowed: 1 or more")
        self.prior, self.reward_range, self.memory = prior, reward_range, memory
        self.met: dict[str, tuple[float, float]] = {}  # prompt -> its mean reward, the level then; newest last
        self.level = torch.zeros(2, dtype=torch.float64)  # decayed sum of rewards and of rollouts
        self.evidence = torch.zeros(2, dtype=torch.float64)  # decayed sums of gap x miss and of gap^2

    @property
    def trust(self) -> float:
        """Return the share of the past in the mixture, from 0 to 1."""
        high_low = self.reward_range[1] - self.reward_range[0]
        product, square = self.evidence.tolist()
        return min(1.0, max(0.0, product / (square + CAUTION * (high_low / 4) ** 2)))

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the expected reward of each prompt, [G] float32 inside the reward range."""
        prediction = self.prior.predict(prompts)
        past, known = self._past(prompts)
        mixed = prediction + self.trust * (past.to(prediction.dtype) - prediction)
        return torch.where(known, mixed, prediction).clamp(*self.reward_range)

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Measure how both did on prompts met before, then take the outcomes in.

        Args:
            prompts: G prompts.
            means: mean rewards [G] float.
            counts: rollouts behind each mean, [G] int64; 0 leaves the prompt out.
        """
        past, known = self._past(prompts)
        known &= counts > 0
        rollouts = float(counts.sum())
        self.evidence *= 0.5 ** (rollouts / RELIABILITY_HALF_LIFE)
        if bool(known.any()):
            prediction = self.prior.predict(prompts).double()[known]
            gap, miss, weight = past[known] - prediction, means.double()[known] - prediction, counts.double()[known]
            self.evidence += torch.stack([(weight * gap * miss).sum(), (weight * gap.square()).sum()])
        self.prior.observe(prompts, means, counts)
        seen = counts > 0
        sums = torch.stack([(means[seen].double() * counts[seen]).sum(), torch.tensor(rollouts, dtype=torch.float64)])
        self.level = self.level * 0.5 ** (rollouts / LEVEL_HALF_LIFE) + sums
        level = self._level()
        for prompt, mean, count in zip(prompts, means.tolist(), counts.tolist(), strict=True):
            if count > 0:
                self.met.pop(prompt, None)
                self.met[prompt] = (mean, level)
        forget_oldest(self.met, self.memory)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the other prior's state and what was met."""
        text, lengths = pack_text(list(self.met))
        met = torch.tensor(list(self.met.values()), dtype=torch.float64).reshape(-1, 2)
        own = {"text": text, "lengths": lengths, "met": met, "level": self.level, "evidence": self.evidence}
        past = {name: value.clone() for name, value in own.items()}
        return under("past.", past) | under("prior.", self.prior.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.prior.load_state_dict(below("prior.", state))
        own = below("past.", state)
        self.level, self.evidence = own["level"].clone(), own["evidence"].clone()
        pairs = [(mean, level) for mean, level in own["met"].tolist()]
        self.met = dict(zip(unpack_text(own["text"], own["lengths"]), pairs, strict=True))

    def _level(self) -> float:
        return float(self.level[0] / self.level[1]) if float(self.level[1]) else sum(self.reward_range) / 2

    def _past(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the corrected past of each prompt, [G] float64, and whether it has one, [G] bool."""
        level = self._level()
        found = [self.met.get(prompt) for prompt in prompts]
        past = [0.0 if entry is None else entry[0] + level - entry[1] for entry in found]
        known = torch.tensor([entry is not None for entry in found], dtype=torch.bool)
        return torch.tensor(past, dtype=torch.float64).clamp(*self.reward_range), known
