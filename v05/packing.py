"""Between padded `[B, L]` tensors and packed tokens, and the weight that each aggregation gives a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from v05.batch import check_offsets, offsets_of

AGGREGATIONS: Final = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the kept tokens of a padded batch lie; made once, then used for every tensor of the batch.

    Attributes:
        positions: of the kept tokens in the flattened batch, row by row, [T] int64.
        sequence_offsets: row i keeps `positions[sequence_offsets[i]:sequence_offsets[i + 1]]`, [B + 1] int64.
        shape: B and L.
    """

    positions: Tensor
    sequence_offsets: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Layout:
        """Return the layout of a mask; waits for its device once.

        Args:
            mask: [B, L], bool or numbers; what is not 0 is kept. Padding may lie left, right or in between, and rows
                may be empty.

        Raises:
            ValueError: `mask` has not two dimensions.
        """
        if mask.dim() != 2:
            raise ValueError(f"mask has shape {list(mask.shape)}; allowed: [B, L]")
        keep = mask != 0
        return cls(keep.flatten().nonzero().squeeze(1), offsets_of(keep.sum(1)), (mask.shape[0], mask.shape[1]))

    @property
    def counts(self) -> Tensor:
        """Return the kept tokens per row, [B] int64."""
        return self.sequence_offsets.diff()

    @property
    def rows(self) -> Tensor:
        """Return the row of each kept token, [T] int64."""
        return self.positions.div(max(1, self.shape[1]), rounding_mode="floor")

    def pack(self, values: Tensor) -> Tensor:
        """Return the kept tokens end to end; what is masked has gradient 0, whatever it holds.

        Args:
            values: [B, L, ...] of any dtype, on the mask's device.

        Returns:
            [T, ...], differentiable in `values`.

        Raises:
            ValueError: the first two dimensions are not the mask's.
        """
        if tuple(values.shape[:2]) != self.shape:
            raise ValueError(f"values has shape {list(values.shape)}; allowed: {list(self.shape)}, then any dimensions")
        return values.flatten(0, 1).index_select(0, self.positions)

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Return packed tokens where they were, and `fill` elsewhere.

        Args:
            packed: [T, ...] of any dtype, on the mask's device.
            fill: what masked places hold.

        Returns:
            [B, L, ...], differentiable in `packed`.

        Raises:
            ValueError: there are not T tokens.
        """
        if packed.shape[:1] != self.positions.shape:
            raise ValueError(
                f"packed has shape {list(packed.shape)}; allowed: {len(self.positions)}, then any dimensions"
            )
        empty = packed.new_full((self.shape[0] * self.shape[1], *packed.shape[1:]), fill)
        return empty.index_copy(0, self.positions, packed).unflatten(0, self.shape)


def normalizer(aggregation: str, sequence_offsets: Tensor, *, max_length: int) -> float:
    """Return what the whole batch's weighted sum is divided by under `aggregation`.

    Sum this over ranks, or take it from the whole batch before splitting it, and the gradient does not depend on
    the split.

    Args:
        aggregation: one of `AGGREGATIONS`.
        sequence_offsets: of every sequence in the global batch, [N + 1] int64.
        max_length: the constant length of `seq-mean-token-sum-norm`, in tokens.

    Returns:
        Tokens (`token-mean`), sequences (`seq-mean-*`), or sequences times `max_length`; at least 1.

    Raises:
        ValueError: unknown aggregation, or `max_length` below 1.
    """
    _check_aggregation(aggregation)
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; allowed: 1 or more")
    sequences = len(sequence_offsets) - 1
    if aggregation == "token-mean":
        return float(max(1, int(sequence_offsets[-1])))
    return float(max(1, sequences * (max_length if aggregation == "seq-mean-token-sum-norm" else 1)))


def token_weights(aggregation: str, sequence_offsets: Tensor, *, divisor: float) -> Tensor:
    """Return what each token counts in the loss.

    Args:
        aggregation: `token-mean`, `seq-mean-token-sum`, `seq-mean-token-sum-norm` weigh every token `1 / divisor`;
            `seq-mean-token-mean` weighs it `1 / (length of its sequence * divisor)`.
        sequence_offsets: [N + 1] int64.
        divisor: the global normaliser, from `normalizer`, above 0.

    Returns:
        Weights [T] float32, on the device of the offsets.

    Raises:
        ValueError: unknown aggregation, bad offsets, or `divisor` not above 0.
    """
    _check_aggregation(aggregation)
    if not divisor > 0:
        raise ValueError(f"divisor is {divisor}; allowed: above 0")
    total = int(sequence_offsets[-1])
    check_offsets("sequence_offsets", sequence_offsets, total)
    if aggregation != "seq-mean-token-mean":
        return torch.full((total,), 1.0 / divisor, dtype=torch.float32, device=sequence_offsets.device)
    lengths = sequence_offsets.diff()
    return torch.repeat_interleave(1.0 / (lengths.clamp(min=1).double() * divisor), lengths).float()


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
