"""Prompts as a prior reads them, and what it expects of them as rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

TOLERANCE: Final = 1e-4  # of the reward range: how far outside of it rounding may put a number


class Predictor(Protocol):
    """All that a prior must do; `observe`, `state_dict` and `load_state_dict` of `v05.value.prior.Prior` are used too
    where it has them."""

    def predict(self, prompts: Sequence[str]) -> Any:
        """Return one number per prompt: a tensor, an array or a list."""
        ...


def check_prior(prior: Any) -> None:
    """Raise TypeError where `prior` cannot predict."""
    if isinstance(prior, type) or not callable(getattr(prior, "predict", None)):
        given = f"the class {prior.__name__}" if isinstance(prior, type) else type(prior).__name__
        raise TypeError(f"prior is {given}; allowed: an object with predict(prompts), or None")


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return a prompt as one text: of a conversation, each message's role and text, images left out."""
    if isinstance(prompt, str):
        return prompt
    lines = []
    for message in prompt:
        content = message.get("content") or ""  # None where tools are called
        if not isinstance(content, str):
            content = " ".join(part["text"] or "" for part in content if part.get("type") == "text")
        lines.append(f"{message['role']}: {content}")
    return "\n".join(lines)


def within(name: str, values: Tensor, low: float, high: float, advice: str) -> Tensor:
    """Return `values`, rounding outside `[low, high]` taken off; NaN stays.

    Raises:
        ValueError: a value farther out than rounding; the message ends with `advice`.
    """
    slack = TOLERANCE * (high - low)
    outside = (values < low - slack) | (values > high + slack)
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise ValueError(f"{name}[{where}] is {float(values[where]):g}; allowed: {low:g} to {high:g}; {advice}")
    return values.clamp(low, high)


def expected_rewards(
    prior: Predictor, texts: Sequence[str], reward_range: tuple[float, float], gives: str = "reward"
) -> Tensor:
    """Return what a prior expects of each prompt, as rewards.

    Args:
        prior: asked for one number per prompt.
        texts: G prompts.
        reward_range: smallest and largest reward.
        gives: what the numbers are: `reward`, or the `probability` of the largest reward.

    Returns:
        [G] float32 inside `reward_range`.

    Raises:
        ValueError: another number of predictions than prompts, or predictions out of their range.
    """
    low, high = reward_range
    predictions = torch.as_tensor(prior.predict(texts)).detach().cpu().float()
    if predictions.shape != (len(texts),):
        raise ValueError(f"predict returned shape {tuple(predictions.shape)}; allowed: ({len(texts)},), one per prompt")
    if not bool(predictions.isfinite().all()):
        raise ValueError(f"predict returned {float(predictions[~predictions.isfinite()][0])}; allowed: finite numbers")
    if gives == "probability":
        return low + (high - low) * within("predict", predictions, 0.0, 1.0, "prior_gives='reward' takes rewards")
    return within("predict", predictions, low, high, "set reward_range, or prior_gives='probability'")
