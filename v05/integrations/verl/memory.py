"""What was expected of each prompt before its rollouts: one Ray actor that the agent loops and the estimator share.

It also keeps what calibrated fusion has found so far, which the estimator learns and the look-ahead uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from v05.integrations.prior_state import prior_tensors, restore_prior
from v05.integrations.verl.settings import Settings, load
from v05.value.memory import forget_oldest, pack_text, unpack_text
from v05.value.prior import Prior
from v05.value.priors import named_prior

NAME: Final = "v05_memory"
REMEMBERED: Final = 65_536  # uids whose prior is kept at most; the oldest go first


def history(reward_range: tuple[float, float]) -> Prior:
    """Return kernel regression over the policy's recent outcomes, with each prompt's own past."""
    return named_prior("history", reward_range)


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
        self.prior: Any = load("memory", settings.memory)(settings.reward_range)
        self.expected: dict[str, float] = {}  # by uid, newest last
        self.calibration: Tensor | None = None  # of calibrated fusion: what the batches so far say of the prior

    def start(self, uid: str, prompt: str) -> tuple[float, Tensor | None]:
        """Return the expected reward of a prompt that is about to be rolled out, and remember it; and `mixture`."""
        self.expected[uid] = float(self.prior.predict([prompt])[0])
        forget_oldest(self.expected, REMEMBERED)
        return self.expected[uid], self.calibration

    def finish(self, prompt: str, rewards: list[float]) -> None:
        """Learn from all rollouts of a prompt, where the prior does."""
        observe = getattr(self.prior, "observe", None)
        if observe is not None:
            observe([prompt], torch.tensor([sum(rewards) / len(rewards)]), torch.tensor([len(rewards)]))

    def recall(self, uids: list[str]) -> list[float]:
        """Return what was expected under these uids.

        Raises:
            ValueError: nothing was, or it is forgotten.
        """
        unknown = [uid for uid in uids if uid not in self.expected]
        if unknown:
            raise ValueError(f"no prior under uid {unknown[0]!r} ({len(unknown)} of {len(uids)} uids unknown)")
        return [self.expected[uid] for uid in uids]

    def mixture(self) -> Tensor | None:
        """Return the state of calibrated fusion; None before the first batch."""
        return self.calibration

    def learn(self, mixture: Tensor) -> None:
        """Remember the state of calibrated fusion after a batch."""
        self.calibration = mixture.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is known, as a checkpoint can hold it."""
        text, lengths = pack_text(list(self.expected))
        expected = torch.tensor(list(self.expected.values()), dtype=torch.float64)
        own = {"uids": text, "lengths": lengths, "expected": expected}
        found = {} if self.calibration is None else {"mixture": self.calibration}
        return own | found | prior_tensors(self.prior)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned; one of another prior is left alone, with a warning."""
        same = restore_prior(self.prior, state)
        uids = unpack_text(state["uids"], state["lengths"])
        self.expected = dict(zip(uids, state["expected"].tolist(), strict=True))
        self.calibration = state.get("mixture") if same else None


def start_memory(settings: Settings) -> Any:
    """Return the handle of the job's memory, started where it is not yet; it ends with the last handle."""
    ray = ray_module()
    return ray.remote(Memory).options(name=NAME, get_if_exists=True, num_cpus=0).remote(settings)


def running_memory() -> Any:
    """Return the handle of the job's memory.

    Raises:
        ValueError: the job has none.
    """
    try:
        return ray_module().get_actor(NAME)
    except ValueError as error:
        manager = "actor_rollout_ref.rollout.agent.agent_loop_manager_class"
        raise ValueError(f"no memory is running; {manager} must be one of v05.integrations.verl.rollouts") from error


class Recalled:
    """What the look-ahead used, for the estimator: `algorithm.v05.prior` is this class's full name.

    Its methods raise ValueError where the job has no memory.
    """

    def predict(self, uids: list[str]) -> Tensor:
        """Return what was expected of each group before its rollouts, [G] float32.

        Raises:
            ValueError: the memory does not know a uid.
        """
        return torch.tensor(ray_module().get(running_memory().recall.remote(uids)), dtype=torch.float32)

    def mixture(self) -> Tensor | None:
        """Return the state of calibrated fusion that the look-ahead used; None before the first batch."""
        found: Tensor | None = ray_module().get(running_memory().mixture.remote())
        return found

    def learn(self, mixture: Tensor) -> None:
        """Tell the look-ahead the state of calibrated fusion after a batch."""
        ray_module().get(running_memory().learn.remote(mixture))
