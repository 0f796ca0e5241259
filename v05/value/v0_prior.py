"""V0 as the trainer's prior: conditioned anew on the policy's newest outcomes as rollouts come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from v05.value.context import PolicyContext
from v05.value.memory import below, pack_text, under, unpack_text
from v05.value.model import V0, Conditioned, Record

SMALLEST: Final = 16  # outcomes below which their mean is all that is used
FIRST_STEPS, LATER_STEPS = 30, 4  # of the search for hyper-parameters, which goes on from the last ones


class V0Prior:
    """Expected rewards by V0, given what the current policy did on other prompts."""

    def __init__(self, model: V0, context: PolicyContext, refresh: int = 128) -> None:
        """Start with an empty context.

        Args:
            model: V0.
            context: of the policy; `observe` keeps it up to date.
            refresh: rollouts between two fits to the context.

        Raises:
            ValueError: `refresh` is not above 0.
        """
        if refresh < 1:
            raise ValueError(f"refresh is {refresh}; allowed: 1 or more")
        self.model, self.context, self.refresh = model, context, refresh
        self.reward_range = context.reward_range
        self.used = Record([], torch.zeros(0, dtype=torch.float64))  # the context that is fitted
        self.since = 0  # rollouts since that fit
        self.parameters = torch.zeros(0, dtype=torch.float64)  # of the Gaussian process; empty before the first fit
        self.conditioned: Conditioned | None = None

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the expected reward of each prompt, [G] float32; the middle of the range where nothing is known."""
        low, high = self.reward_range
        if self.conditioned is None:
            known = len(self.used.prompts) > 0
            return torch.full((len(prompts),), float(self.used.outcomes.mean()) if known else (low + high) / 2)
        return (low + (high - low) * self.conditioned.predict(prompts)).clamp(low, high)

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Add outcomes to the context, and fit to it again where enough have come; see `PolicyContext.observe`."""
        self.context.observe(prompts, means, counts)
        self.since += int(counts.sum())
        if self.since >= self.refresh or self.conditioned is None:
            self.used, self.since = Record(*self.context.draw()), 0
            self._fit(LATER_STEPS if len(self.parameters) else FIRST_STEPS)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the remembered outcomes, the context that is fitted, and its hyper-parameters."""
        text, lengths = pack_text(self.used.prompts)
        used = {"text": text, "lengths": lengths, "outcomes": self.used.outcomes.clone()}
        own = {"since": torch.tensor(self.since), "parameters": self.parameters.clone()}
        return under("context.", self.context.state_dict()) | under("used.", used) | own

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned; the fit is repeated with the hyper-parameters of then."""
        self.context.load_state_dict(below("context.", state))
        prompts = unpack_text(state["used.text"], state["used.lengths"])
        self.used = Record(prompts, state["used.outcomes"].clone())
        self.since, self.parameters = int(state["since"]), state["parameters"].clone()
        self._fit(0)

    def _fit(self, steps: int) -> None:
        self.conditioned = None
        if len(self.used.prompts) < SMALLEST:
            return
        start = self.parameters if len(self.parameters) else None
        self.conditioned = self.model.condition([self.used], reward_range=self.reward_range, start=start, steps=steps)
        if self.conditioned.joint is not None:
            self.parameters = self.conditioned.joint.parameters
