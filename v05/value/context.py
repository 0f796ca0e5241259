"""What the policy did lately: the context that V0 is given, stratified, bounded, and forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from v05.value.memory import pack_text, unpack_text

DEFAULT_SIZE: Final = 256
STRATA: Final = 4  # of equal width over the reward range


class PolicyContext:
    """The newest outcomes of the current policy, one a prompt, from which a stratified context is drawn.

    Outcomes older than `window` rollouts are dropped: the policy has moved on. Of the rest, each of `STRATA` bands of
    the reward gets places in proportion to its share, the newest first, so that a context of any size has the policy's
    mean, and its rare successes or failures too.
    """

    def __init__(
        self, reward_range: tuple[float, float], size: int = DEFAULT_SIZE, window: int = 2048, memory: int = 1024
    ) -> None:
        """Start empty.

        Args:
            reward_range: smallest and largest reward.
            size: prompts in a context at most.
            window: rollouts after which an outcome is forgotten.
            memory: prompts remembered at most.

        Raises:
            ValueError: a number is not above 0, or `memory` is below `size`.
        """
        if not (size > 0 and window > 0 and memory >= size):
            raise ValueError(
                f"size, window and memory are {size}, {window}, {memory}; allowed: above 0, memory >= size"
            )
        self.reward_range, self.size, self.window, self.memory = reward_range, size, window, memory
        self.outcomes: dict[str, tuple[float, int, int]] = {}  # prompt -> mean reward, rollouts, time; newest last
        self.time = 0  # rollouts seen

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Add outcomes; a prompt seen again replaces its older outcome.

        Args:
            prompts: G prompts.
            means: mean rewards [G] float.
            counts: rollouts behind each, [G] int64; 0 leaves the prompt out.
        """
        self.time += int(counts.sum())
        for prompt, mean, count in zip(prompts, means.tolist(), counts.tolist(), strict=True):
            if count > 0:
                self.outcomes.pop(prompt, None)
                self.outcomes[prompt] = (mean, count, self.time)
        old = [prompt for prompt, (_, _, time) in self.outcomes.items() if self.time - time > self.window]
        excess = max(len(old), len(self.outcomes) - self.memory)  # entries are in the order of their time
        for prompt in list(self.outcomes)[:excess]:
            del self.outcomes[prompt]

    def draw(self) -> tuple[list[str], Tensor]:
        """Return at most `size` prompts, oldest first, and their mean rewards [N] float64."""
        entries = list(self.outcomes.items())
        chosen = range(len(entries)) if len(entries) <= self.size else self._stratified([e[1][0] for e in entries])
        prompts = [entries[row][0] for row in chosen]
        return prompts, torch.tensor([self.outcomes[prompt][0] for prompt in prompts], dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that is remembered, as tensors."""
        text, lengths = pack_text(list(self.outcomes))
        values = list(self.outcomes.values())
        return {
            "text": text,
            "lengths": lengths,
            "means": torch.tensor([mean for mean, _, _ in values], dtype=torch.float64),
            "counts": torch.tensor([count for _, count, _ in values], dtype=torch.int64),
            "times": torch.tensor([time for _, _, time in values], dtype=torch.int64),
            "time": torch.tensor(self.time),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned."""
        prompts = unpack_text(state["text"], state["lengths"])
        columns = (state[name].tolist() for name in ("means", "counts", "times"))
        self.outcomes = dict(zip(prompts, zip(*columns, strict=True), strict=True))
        self.time = int(state["time"])

    def _stratified(self, means: Sequence[float]) -> list[int]:
        """Return `size` rows in order: every stratum its share, rounded by largest remainder, the newest of each."""
        low, high = self.reward_range
        band = [min(STRATA - 1, int((mean - low) / (high - low) * STRATA)) for mean in means]
        rows = [[row for row, own in enumerate(band) if own == number] for number in range(STRATA)]
        shares = [len(part) * self.size / len(means) for part in rows]
        places = [int(share) for share in shares]
        by_remainder = sorted(range(STRATA), key=lambda number: places[number] - shares[number])
        for number in by_remainder[: self.size - sum(places)]:
            places[number] += 1
        return sorted(row for part, count in zip(rows, places, strict=True) for row in part[len(part) - count :])
