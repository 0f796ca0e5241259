"""Algorithms by name, and their advantages by hand."""

import pytest
import torch

from v05.batch import Groups
from v05.errors import InputError
from v05.training.algorithms import equal_groups, parse_algorithm


def test_algorithm_names() -> None:
    assert parse_algorithm("grpo:8").k_max == 8
    assert (parse_algorithm("v05:1").k_init, parse_algorithm("v05:1").k_max) == (1, 16)
    assert (parse_algorithm("v05:4-4").k_init, parse_algorithm("v05:4-4@1e-4").k_max) == (4, 4)
    assert (parse_algorithm("v05_calibrated_loo:1-8").k_init, parse_algorithm("v05:20-32").k_max) == (1, 32)
    assert (parse_algorithm("v05_from_one").k_init, parse_algorithm("v05_from_one@1e-4").cost) == (1, 1 / 64)
    assert parse_algorithm("dr_grpo:4@1e-4").learning_rate == 1e-4
    assert (parse_algorithm("grpo").aggregation, parse_algorithm("grpo").clip_high) == ("seq-mean-token-mean", 0.2)
    assert (parse_algorithm("dapo").aggregation, parse_algorithm("dapo").clip_high) == ("token-mean", 0.28)
    assert parse_algorithm("dr_grpo").aggregation == "seq-mean-token-sum-norm"
    for bad, message in (
        ("ppo", "name one of v05"),
        ("grpo:1", "allowed: 2 or more"),
        ("opo:1", "allowed: 2 or more"),
        ("v05:17", "allowed: 1 to 16"),
        ("v05:x", "k is 'x'"),
        ("v05:8-4", "1 <= k <= k_max"),
        ("v05:4-2147483648", "a k_max of 2147483647 or less"),
        ("grpo:4-16", "allowed: 2 or more"),
        ("v05@0", "a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            parse_algorithm(bad)


def test_advantages_by_hand() -> None:
    groups = Groups.from_lists(["a", "b"], [0, 1], [[1.0, 0.0], [0.0]])
    prior = torch.tensor([0.25, 0.5])
    spo = parse_algorithm("spo")
    assert spo.advantages(groups, prior, (0.0, 1.0)).tolist() == [0.75, -0.25, -0.5]
    assert parse_algorithm("dr_grpo").advantages(groups, None, (0.0, 1.0)).tolist() == [0.5, -0.5, 0.0]
    for name in ("grpo", "dapo"):
        found = parse_algorithm(name).advantages(groups, None, (0.0, 1.0))
        assert found.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0], abs=1e-4)
    with pytest.raises(InputError, match="prior is None"):
        spo.advantages(groups, None, (0.0, 1.0))
    found = parse_algorithm("opo").advantages(groups, None, (0.0, 1.0), lengths=torch.tensor([3, 1, 2]))
    assert found.tolist() == [0.25, -0.75, 0.0]  # the mean by length is 3 / 4


def test_equal_groups() -> None:
    groups = Groups.from_lists("abcd", range(4), [[1.0, 1.0], [0.0, 1.0], [], [0.5]])
    assert equal_groups(groups).tolist() == [True, False, True, True]
