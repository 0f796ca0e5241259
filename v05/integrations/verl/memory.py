"""What was expected of each prompt before its rollouts: one Ray actor that the agent loops and the estimator share."""

from __future__ import annotations

import importlib
from typing import Any, Final

import torch
from torch import Tensor

from v05.integrations.verl.settings import Settings, load
from v05.value.history import HistoryPrior
from v05.value.past import WithPast
from v05.value.prior import Prior

NAME: Final = "v05_memory"
REMEMBERED: Final = 65_536  # uids whose prior is kept at most; the oldest go first


def history(reward_range: tuple[float, float]) -> Prior:
    """Return kernel regression over the policy's recent outcomes, with each prompt's own past."""
    return WithPast(HistoryPrior(reward_range), reward_range)


def ray_module() -> Any:
    """Return Ray.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("v05.integrations.verl.memory needs ray; install it: pip install 'v05[verl]'") from error


class Memory:
    """Predicts before rollouts, learns after them, and remembers what it had predicted for which uid."""

    def __init__(self, settings: Settings) -> None:
        """Make the prior that `settings.memory` names."""
        self.prior: Prior = load("memory", settings.memory)(settings.reward_range)
        self.expected: dict[str, float] = {}  # by uid, newest last

    def start(self, uid: str, prompt: str) -> float:
        """Return the expected reward of a prompt that is about to be rolled out, and remember it."""
        self.expected[uid] = float(self.prior.predict([prompt])[0])
        for old in list(self.expected)[: max(0, len(self.expected) - REMEMBERED)]:
            del self.expected[old]
        return self.expected[uid]

    def finish(self, prompt: str, rewards: list[float]) -> None:
        """Learn from all rollouts of a prompt."""
        self.prior.observe([prompt], torch.tensor([sum(rewards) / len(rewards)]), torch.tensor([len(rewards)]))

    def recall(self, uids: list[str]) -> list[float]:
        """Return what was expected under these uids.

        Raises:
            ValueError: nothing was, or it is forgotten.
        """
        unknown = [uid for uid in uids if uid not in self.expected]
        if unknown:
            raise ValueError(f"no prior under uid {unknown[0]!r} ({len(unknown)} of {len(uids)} uids unknown)")
        return [self.expected[uid] for uid in uids]


def start_memory(settings: Settings) -> Any:
    """Return the handle of the job's memory, started where it is not yet; it ends with the last handle."""
    ray = ray_module()
    return ray.remote(Memory).options(name=NAME, get_if_exists=True, num_cpus=0).remote(settings)


class Recalled:
    """The prior that the look-ahead used, for the estimator: `algorithm.v05.prior` is this class's full name."""

    def predict(self, uids: list[str]) -> Tensor:
        """Return what was expected of each group before its rollouts, [G] float32.

        Raises:
            ValueError: the job has no memory, or does not know a uid.
        """
        ray = ray_module()
        try:
            memory = ray.get_actor(NAME)
        except ValueError as error:
            manager = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
            raise ValueError(f"no memory is running; {manager} must be that of v05.integrations.verl") from error
        return torch.tensor(ray.get(memory.recall.remote(uids)), dtype=torch.float32)
