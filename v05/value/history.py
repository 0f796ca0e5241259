"""A prior from the policy's own past: kernel regression over recent prompts and outcomes, with forgetting."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

BUCKETS: Final = 256  # hash buckets per block of n-gram features
# Kernels tried side by side: (share of the distance that letters have against shapes, bandwidth).
KERNELS: Final = tuple((share, width) for share in (0.0, 0.2, 0.6) for width in (0.1, 0.2, 0.4, 10.0))


class HistoryPrior:
    """Predicts from the outcomes of similar prompts; which kernel says "similar" is decided by past errors.

    A prompt is described by counts of its character n-grams (1 to 3), once as written and once as a shape (every digit
    as 9, every lower-case letter as a, every capital as A). Each kernel of `KERNELS` predicts every new batch before
    its outcomes are absorbed; the one with the smallest decayed squared error so far makes the predictions. One
    kernel is so wide that it amounts to a running mean.
    """

    def __init__(
        self,
        reward_range: tuple[float, float],
        capacity: int = 1024,
        half_life: float = 1024.0,
        prior_rollouts: float = 1.0,
    ) -> None:
        """Start without history.

        Args:
            reward_range: smallest and largest reward.
            capacity: prompts remembered; the oldest go first.
            half_life: after this many rollouts an old outcome counts half.
            prior_rollouts: how many rollouts the overall mean counts for in every prediction.

        Raises:
            ValueError: a number is not above 0.
        """
        for name, value in (("capacity", capacity), ("half_life", half_life), ("prior_rollouts", prior_rollouts)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; allowed: above 0")
        self.reward_range = reward_range
        self.capacity = capacity
        self.half_life = half_life
        self.prior_rollouts = prior_rollouts
        self.features = torch.zeros(0, 2, BUCKETS)  # [M, block, bucket]
        self.means = torch.zeros(0)  # [M]
        self.counts = torch.zeros(0)  # [M], decayed
        self.errors = torch.zeros(len(KERNELS), dtype=torch.float64)  # decayed squared errors

    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Return the expected reward of each prompt.

        Args:
            prompts: G prompts.

        Returns:
            [G] float32 inside the reward range; its middle where nothing was observed yet.
        """
        return self._predict_all(describe(prompts))[int(self.errors.argmin())]

    def observe(self, prompts: Sequence[str], means: Tensor, counts: Tensor) -> None:
        """Score every kernel on a batch, then absorb it.

        Args:
            prompts: G prompts.
            means: mean rewards [G] float.
            counts: rollouts behind each mean, [G] int64; 0 leaves the prompt out.
        """
        seen = counts > 0
        features, means, weights = describe(prompts)[seen], means[seen].float(), counts[seen].float()
        decay = 0.5 ** (float(weights.sum()) / self.half_life)
        if len(self.means):
            misses = (self._predict_all(features) - means).square() * weights
            self.errors = self.errors * decay + misses.double().sum(dim=1)
        self.features = torch.cat([self.features, features])[-self.capacity :]
        self.means = torch.cat([self.means, means])[-self.capacity :]
        self.counts = torch.cat([self.counts * decay, weights])[-self.capacity :]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the remembered outcomes and the kernels' errors."""
        names = ("features", "means", "counts", "errors")
        return {name: getattr(self, name).clone().contiguous() for name in names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.features, self.means = state["features"].clone(), state["means"].clone()
        self.counts, self.errors = state["counts"].clone(), state["errors"].clone()

    def _predict_all(self, features: Tensor) -> Tensor:
        """Return every kernel's prediction for described prompts, [kernels, G]."""
        low, high = self.reward_range
        if not len(self.means):
            return torch.full((len(KERNELS), len(features)), (low + high) / 2)
        overall = (self.counts * self.means).sum() / self.counts.sum()
        similarity = torch.einsum("gbf,mbf->bgm", features, self.features)
        letters, shapes = (2 - 2 * similarity).clamp(min=0)  # squared distances between unit vectors
        predictions = []
        for share, width in KERNELS:
            distance = share * letters + (1 - share) * shapes
            weights = torch.exp(-distance / (2 * width**2)) * self.counts
            summed = weights @ self.means + self.prior_rollouts * overall
            predictions.append(summed / (weights.sum(dim=1) + self.prior_rollouts))
        return torch.stack(predictions).clamp(low, high)


def describe(prompts: Sequence[str]) -> Tensor:
    """Return hashed n-gram counts of each prompt as written and of its shape.

    Args:
        prompts: G texts.

    Returns:
        [G, 2, `BUCKETS`] float32; each of the two vectors has length 1, or 0 for an empty text.
    """
    counts = torch.zeros(len(prompts), 2, BUCKETS)
    for row, prompt in enumerate(prompts):
        for block, text in enumerate((prompt, shape(prompt))):
            grams = [text[start : start + size] for size in (1, 2, 3) for start in range(len(text) - size + 1)]
            buckets = torch.tensor([zlib.crc32(gram.encode()) % BUCKETS for gram in grams], dtype=torch.int64)
            counts[row, block] = torch.bincount(buckets, minlength=BUCKETS)
    return torch.nn.functional.normalize(counts, dim=-1)


def shape(text: str) -> str:
    """Return `text` with every digit as 9, every capital as A and every other letter as a."""
    return "".join(
        "9" if letter.isdigit() else "A" if letter.isupper() else "a" if letter.isalpha() else letter for letter in text
    )
