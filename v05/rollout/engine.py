"""What the trainer asks of whatever generates rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    Attributes:
        prompt_ids: token ids of the prompt.
        token_ids: token ids of the answer; the end token is included where it was sampled.
        logprobs: log-probability of each of `token_ids` at the sampling temperature, in nats, as the sampler saw it.
        text: the answer without special tokens.
        finished: whether the end token was sampled before the limit.
        versions: number of the policy's weights that sampled each token; empty where the engine does not count them.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finished: bool
    versions: tuple[int, ...] = ()


class Engine(Protocol):
    """Generates rollouts with its own copy of the policy's weights."""

    def generate(
        self, prompts: Sequence[str], counts: Sequence[int], *, seed: int, temperature: float, max_new_tokens: int
    ) -> list[list[Rollout]]:
        """Sample answers.

        Args:
            prompts: the prompts.
            counts: how many answers to each, 0 or more.
            seed: fixes every draw of this call.
            temperature: divides the logits, above 0.
            max_new_tokens: limit of an answer's tokens, end token included.

        Returns:
            One list of rollouts per prompt, `counts` long.
        """
        ...

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the policy's weights, by parameter name; the next `generate` samples from them."""
        ...


def check_request(prompts: Sequence[str], counts: Sequence[int], temperature: float, max_new_tokens: int) -> None:
    """Check what `Engine.generate` was asked.

    Raises:
        ValueError: lengths differ, or a number is outside what is allowed.
    """
    if len(prompts) != len(counts):
        raise ValueError(f"{len(prompts)} prompts with {len(counts)} counts; allowed: one count per prompt")
    for index, count in enumerate(counts):
        if count < 0:
            raise ValueError(f"counts[{index}] is {count}; allowed: 0 or more")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: above 0")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; allowed: 1 or more")
