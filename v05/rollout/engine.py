"""What the trainer asks of whatever generates rollouts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from torch import Tensor

logger = logging.getLogger(__name__)


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


NOTHING: Final = Rollout((), (), (), "", finished=False)


class Unanswered(RuntimeError):
    """Some answers of a batch could not be had, however often they were asked for; the others are there.

    Attributes:
        rows: what `Engine.generate` returns, with None in the place of such an answer.
        reasons: one for each of them, with its prompt.
    """

    def __init__(self, rows: list[list[Rollout | None]], reasons: list[str]) -> None:
        """Say how many there are, and why there is not the first."""
        super().__init__(f"{len(reasons)} of {sum(map(len, rows))} answers could not be had; {reasons[0]}")
        self.rows, self.reasons = rows, reasons


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

        Raises:
            Unanswered: some of them could not be had.
        """
        ...

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the policy's weights, by parameter name; the next `generate` samples from them."""
        ...


def wrong_where_unanswered(
    generate: Callable[..., list[list[Rollout]]], prompts: Sequence[str], counts: Sequence[int], **limits: Any
) -> list[list[Rollout]]:
    """Call `generate`; an answer that could not be had is `NOTHING`, which is wrong, and is warned of.

    Raises:
        Unanswered: not one answer could be had.
    """
    try:
        return generate(prompts, counts, **limits)
    except Unanswered as error:
        if not any(rollout for row in error.rows for rollout in row):
            raise
        for reason in error.reasons:
            logger.warning("%s; it counts as wrong", reason)
        return [[rollout or NOTHING for rollout in row] for row in error.rows]


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
