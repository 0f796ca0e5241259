"""The range that estimators without a prior compute with."""

import math

import pytest
import torch

from v05.integrations.reward_range import widened


def test_rewards_outside_widen_the_range() -> None:
    assert widened((0.0, 1.0), torch.tensor([0.5, -2.0])) == (-2.0, 1.0)
    assert widened((0.0, 1.0), torch.tensor([])) == (0.0, 1.0)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf])
def test_a_reward_without_end_is_named(wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"rewards\[1\] is {wrong}; allowed: finite"):
        widened((0.0, 1.0), torch.tensor([0.5, wrong]))
