"""Packing rollouts into token arrays."""

from collections.abc import Sequence

import torch

from v05.batch import PackedTokens, offsets_of
from v05.packing import normalizer, token_weights
from v05.rollout.engine import Rollout


def pack(rollouts: Sequence[Rollout], aggregation: str, *, max_length: int) -> PackedTokens:
    """Pack a whole batch of rollouts end to end, weighted by `aggregation` over this batch.

    Args:
        rollouts: N rollouts.
        aggregation: one of `v05.packing.AGGREGATIONS`.
        max_length: the constant length of `seq-mean-token-sum-norm`, in tokens.

    Returns:
        The packed tokens.

    Raises:
        ValueError: unknown aggregation.
    """
    offsets = offsets_of([len(rollout.token_ids) for rollout in rollouts])
    return PackedTokens(
        prompts=tuple(rollout.prompt_ids for rollout in rollouts),
        tokens=torch.tensor([token for rollout in rollouts for token in rollout.token_ids], dtype=torch.int64),
        logprobs=torch.tensor([value for rollout in rollouts for value in rollout.logprobs], dtype=torch.float32),
        weights=token_weights(aggregation, offsets, divisor=normalizer(aggregation, offsets, max_length=max_length)),
        sequence_offsets=offsets,
    )
