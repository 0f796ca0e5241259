"""Packing rollouts into token arrays, with the weight that each aggregation gives a token."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from v05.batch import PackedTokens, check_offsets, offsets_from_lengths
from v05.rollout.engine import Rollout

AGGREGATIONS: Final = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


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


def pack(rollouts: Sequence[Rollout], aggregation: str, *, max_length: int) -> PackedTokens:
    """Pack a whole batch of rollouts end to end, weighted by `aggregation` over this batch.

    Args:
        rollouts: N rollouts.
        aggregation: one of `AGGREGATIONS`.
        max_length: the constant length of `seq-mean-token-sum-norm`, in tokens.

    Returns:
        The packed tokens.

    Raises:
        ValueError: unknown aggregation.
    """
    offsets = offsets_from_lengths([len(rollout.token_ids) for rollout in rollouts])
    return PackedTokens(
        prompts=tuple(rollout.prompt_ids for rollout in rollouts),
        tokens=torch.tensor([token for rollout in rollouts for token in rollout.token_ids], dtype=torch.int64),
        logprobs=torch.tensor([value for rollout in rollouts for value in rollout.logprobs], dtype=torch.float32),
        weights=token_weights(aggregation, offsets, divisor=normalizer(aggregation, offsets, max_length=max_length)),
        sequence_offsets=offsets,
    )


def _check_aggregation(aggregation: str) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
