"""Groups and packed tokens: what they derive, and what they refuse."""

import pytest
import torch

from v05.batch import Groups, PackedTokens, check_offsets


def test_groups_derive_counts_means_and_membership() -> None:
    groups = Groups.from_lists(["a", "b", "c"], [7, 8, 9], [[1.0, 0.0], [1.0], [0.0, 0.0, 1.0]])
    assert groups.offsets.tolist() == [0, 2, 3, 6]
    assert groups.counts.tolist() == [2, 1, 3]
    assert groups.group_of_rollout.tolist() == [0, 0, 1, 2, 2, 2]
    assert torch.allclose(groups.means, torch.tensor([0.5, 1.0, 1 / 3]))


def test_groups_may_be_empty() -> None:
    groups = Groups.from_lists(["a", "b"], [0, 1], [[], [1.0]])
    assert groups.counts.tolist() == [0, 1]
    assert torch.isnan(groups.means[0])


def test_groups_refuse_lengths_that_disagree() -> None:
    with pytest.raises(ValueError, match="G, G and G \\+ 1"):
        Groups(("a",), (0, 1), torch.zeros(2), torch.tensor([0, 2]))


@pytest.mark.parametrize("offsets", [[1, 2], [0, 3], [0, 2, 1, 2]])
def test_offsets_must_cover_everything_in_order(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets is"):
        check_offsets("offsets", torch.tensor(offsets), 2)


def packed(lengths: list[int]) -> PackedTokens:
    total = sum(lengths)
    return PackedTokens(
        prompts=tuple((row,) for row in range(len(lengths))),
        tokens=torch.arange(total),
        logprobs=torch.zeros(total),
        weights=torch.arange(total) / 10,
        sequence_offsets=torch.tensor([0, *lengths]).cumsum(0),
    )


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
def test_split_loses_nothing(parts: int) -> None:
    batch = packed([2, 0, 3, 1, 4])
    pieces = list(batch.split(parts))
    assert torch.cat([piece.tokens for _, piece in pieces]).tolist() == batch.tokens.tolist()
    assert torch.cat([piece.weights for _, piece in pieces]).tolist() == batch.weights.tolist()
    assert [prompt for _, piece in pieces for prompt in piece.prompts] == list(batch.prompts)
    assert [row for rows, _ in pieces for row in range(rows.start, rows.stop)] == list(range(5))


def test_split_needs_a_part() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        list(packed([1]).split(0))


def test_packed_tokens_refuse_lengths_that_disagree() -> None:
    with pytest.raises(ValueError, match="one common length"):
        PackedTokens(((1,),), torch.zeros(2), torch.zeros(1), torch.zeros(2), torch.tensor([0, 2]))
