"""Token weights against hand-computed numbers, and packing."""

import pytest
import torch

from v05.packing import AGGREGATIONS, normalizer, token_weights
from v05.rollout.engine import Rollout
from v05.rollout.pack import pack

OFFSETS = torch.tensor([0, 2, 2, 6])  # sequences of 2, 0 and 4 tokens


@pytest.mark.parametrize(
    ("aggregation", "divisor", "weights"),
    [
        ("token-mean", 6.0, [1 / 6] * 6),
        ("seq-mean-token-mean", 3.0, [1 / 6, 1 / 6, 1 / 12, 1 / 12, 1 / 12, 1 / 12]),
        ("seq-mean-token-sum", 3.0, [1 / 3] * 6),
        ("seq-mean-token-sum-norm", 24.0, [1 / 24] * 6),  # 3 sequences, constant length 8
    ],
)
def test_weights_by_hand(aggregation: str, divisor: float, weights: list[float]) -> None:
    assert normalizer(aggregation, OFFSETS, max_length=8) == divisor
    assert torch.allclose(token_weights(aggregation, OFFSETS, divisor=divisor), torch.tensor(weights))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_parts_are_the_weights_of_the_whole(aggregation: str) -> None:
    divisor = normalizer(aggregation, OFFSETS, max_length=8)
    whole = token_weights(aggregation, OFFSETS, divisor=divisor)
    parts = [token_weights(aggregation, torch.tensor(offsets), divisor=divisor) for offsets in ([0, 2], [0, 0], [0, 4])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_to_weigh(aggregation: str) -> None:
    offsets = torch.tensor([0])
    assert token_weights(aggregation, offsets, divisor=normalizer(aggregation, offsets, max_length=8)).shape == (0,)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_float32_whatever_the_default(aggregation: str) -> None:
    expected = token_weights(aggregation, OFFSETS, divisor=3.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(token_weights(aggregation, OFFSETS, divisor=3.0), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="'median'; allowed: token-mean"):
        normalizer("median", OFFSETS, max_length=8)
    with pytest.raises(ValueError, match="divisor is 0"):
        token_weights("token-mean", OFFSETS, divisor=0)
    with pytest.raises(ValueError, match=r"sequence_offsets is \[0, 3, 2\]; allowed: from 0, never falling, to 2"):
        token_weights("token-mean", torch.tensor([0, 3, 2]), divisor=1.0)
    with pytest.raises(ValueError, match="max_length is 0"):
        normalizer("token-mean", OFFSETS, max_length=0)


def test_pack_keeps_order_and_boundaries() -> None:
    rollouts = [
        Rollout((3, 4), (5, 1), (-0.5, -0.25), "2", True),
        Rollout((6,), (7, 8, 9), (-1.0, -2.0, -3.0), "456", False),
    ]
    batch = pack(rollouts, "seq-mean-token-mean", max_length=4)
    assert batch.prompts == ((3, 4), (6,))
    assert batch.tokens.tolist() == [5, 1, 7, 8, 9]
    assert batch.logprobs.tolist() == [-0.5, -0.25, -1.0, -2.0, -3.0]
    assert batch.sequence_offsets.tolist() == [0, 2, 5]
    assert torch.allclose(batch.weights, torch.tensor([0.25, 0.25, 1 / 6, 1 / 6, 1 / 6]))
