"""How an update divides its rollouts among prompts, and what it counts."""

import torch

from v05.rollout.sample import Sample, first_rollouts
from v05.rollout.share import share_out


def test_rollouts_go_to_the_largest_gain_first() -> None:
    assert share_out([3, 5, 2], [0.1, 0.3, 0.2], 6) == [0, 5, 1]
    assert share_out([3, 5, 2], [0.1, 0.3, 0.2], 99) == [3, 5, 2]
    assert share_out([], [], 4) == []


def test_first_rollouts_keep_back_what_is_expected() -> None:
    assert first_rollouts(128, 16, 0.0) == [16] * 8
    assert first_rollouts(128, 4, 4.0) == [4] * 16
    assert first_rollouts(11, 4, 4.0) == [4, 4, 3]
    assert first_rollouts(3, 4, 0.0) == [3]
    assert first_rollouts(0, 4, 2.0) == []


def test_a_sample_counts_what_it_drops() -> None:
    sample = Sample()
    sample.start(["a", "b"], [0, 1], torch.tensor([0.5, 0.5]))
    sample.spent = 3
    sample.rewards = [[1.0, 1.0], [0.0]]
    sample.drop(torch.tensor([True, False]))
    assert (sample.prompts, sample.dropped, sample.kept) == (["b"], 2, 1)
