"""A task that is solved now and then by chance, and trainers for it."""

from __future__ import annotations

import dataclasses
import random

from v05.rollout.hf import TransformersEngine
from v05.small_policy import make_policy
from v05.tasks import Split
from v05.training.config import TrainConfig
from v05.training.run import make_prior
from v05.training.trainer import Trainer


class FirstDigit:
    """Answer with the prompt's first digit and stop: solved now and then by chance, so that rewards differ."""

    name = "first_digit"
    alphabet = "01="
    reward_range = (0.0, 1.0)
    max_answer_length = 3

    def prompts(self, seed: int, start: int, count: int, split: Split = "train") -> list[str]:
        """Return prompts of three digits."""
        draws = (random.Random(f"{split}/{seed}/{position}") for position in range(start, start + count))
        return ["".join(draw.choices("01", k=3)) + "=" for draw in draws]

    def verify(self, prompt: str, text: str) -> float:
        """Return 1.0 for an answer that starts with the prompt's first digit."""
        return float(text[:1] == prompt[0])

    def demonstration(self, prompt: str, seed: int, position: int) -> str:
        """Return the right answer."""
        return prompt[0]


def make_trainer(**settings: object) -> Trainer:
    defaults = TrainConfig(
        policy="tiny", prior="history", rollouts=192, rollouts_per_update=64, heldout_prompts=8, heldout_samples=2
    )
    config = dataclasses.replace(defaults, **settings)  # type: ignore[arg-type]
    task = FirstDigit()
    policy = make_policy(task.alphabet, config.policy, 0)
    return Trainer(config, policy, task, TransformersEngine(policy), make_prior(config, task.reward_range))
