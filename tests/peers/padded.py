"""Ragged batches as the peers hold them, padded, and as v05 holds them, packed."""

from typing import NamedTuple

import torch
from torch import Tensor

from v05.testing import offsets_of


class Padded(NamedTuple):
    """logprobs, old, ref, sampler and mask `[B, L]`, advantages `[B]`, lengths `[B]`; masked tokens lie inside too."""

    logprobs: Tensor
    old: Tensor
    ref: Tensor
    sampler: Tensor
    mask: Tensor
    advantages: Tensor
    lengths: Tensor

    @property
    def inside(self) -> Tensor:
        """Which positions `[B, L]` belong to a sequence."""
        return torch.arange(self.mask.shape[1]) < self.lengths[:, None]

    @property
    def offsets(self) -> Tensor:
        """Where the packed sequences begin and end, `[B+1]`."""
        return offsets_of(self.lengths)

    def pack(self, values: Tensor) -> Tensor:
        """The positions of `[B, L]` that belong to a sequence, `[T]`."""
        return values.expand(self.mask.shape)[self.inside]

    def weights(self, mode: str, constant: float = 1.0) -> Tensor:
        """What `mode` multiplies each token's loss by, `[B, L]`."""
        mask = self.mask
        counts = mask.sum(1, keepdim=True)
        sequences = (counts > 0).sum()
        return {
            "token-mean": mask / mask.sum(),
            "seq-mean-token-sum": mask / sequences,
            "seq-mean-token-sum-norm": mask / (sequences * constant),
            "seq-mean-token-mean": mask / counts.clamp(min=1) / sequences,
        }[mode]


def padded_batch(seed: int, batch: int = 8, width: int = 24, drift: float = 0.4) -> Padded:
    """A random batch in float64; a sixth of the tokens is masked, and every sequence keeps its first."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (batch,), generator=rng)
    logprobs = -normal(batch, width).abs() - 0.05
    old, ref, sampler = (logprobs + drift * normal(batch, width) for _ in range(3))
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(batch, width, generator=rng) > 1 / 6)
    mask[:, 0] = True
    return Padded(logprobs, old, ref, sampler, mask.double(), normal(batch), lengths)
