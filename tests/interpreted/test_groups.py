"""shrinkage and group_advantage in Triton against the reference, on ragged groups with poisoned outputs."""

import pytest
import torch

from v05.kernels import group_advantage, shrinkage
from v05.kernels.advantage.estimators import ESTIMATORS, SCALES
from v05.testing import assert_as_exact_as, offsets_of, poisoned_outputs, ragged_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("longest", [0, 3, 40])
def test_shrinkage(dtype, longest):
    data = ragged_groups(101, 0, longest, seed=longest, values=(-1.0, 0.3, 1.0), dtype=dtype)
    options = {"leave_one_out": True, "advantages": True, "k_init": 3, "k_max": 20}
    exact = shrinkage(data.rewards.double(), data.offsets, data.prior.double(), backend="reference", **options)
    same = shrinkage(*data, backend="reference", **options)
    with poisoned_outputs():
        result = shrinkage(*data, backend="triton", **options)
    for name, value in result._asdict().items():
        if value is None:
            continue
        if value.dtype.is_floating_point:
            assert_as_exact_as(value, getattr(same, name), getattr(exact, name))
        else:
            assert torch.equal(value, getattr(same, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (-1.0, 0.3, 1.0)])
@pytest.mark.parametrize("own", [False, True])
def test_calibrated_fusion(dtype, values, own):
    data = ragged_groups(101, 0, 13, seed=3, values=values, dtype=dtype)
    options = dict(fusion="calibrated", leave_one_out=own, advantages=True, state=torch.arange(7).to(dtype))
    exact = shrinkage(data.rewards.double(), data.offsets, data.prior.double(), backend="reference", **options)
    same = shrinkage(*data, backend="reference", **options)
    with poisoned_outputs():
        result = shrinkage(*data, backend="triton", **options)
    for name, value in result._asdict().items():
        if value is not None and value.is_floating_point():
            assert_as_exact_as(value, getattr(same, name), getattr(exact, name))
        elif value is not None:
            assert torch.equal(value, getattr(same, name)), name


def test_no_groups():
    result = shrinkage(torch.empty(0), torch.tensor([0]), torch.empty(0), backend="triton")
    assert result.baseline.numel() == 0


ALLOWED = [
    (name, scale) for name in ESTIMATORS for scale in SCALES if "none" in (scale, ESTIMATORS[name].scale.name.lower())
]


@pytest.mark.parametrize(("estimator", "scale"), ALLOWED)
def test_advantage(estimator, scale):
    data = ragged_groups(70, 0, 21, seed=4, values=(-1.0, 0.3, 1.0))
    prior = data.prior if ESTIMATORS[estimator].needs_prior else None
    options = {"estimator": estimator, "scale": scale}
    wide = None if prior is None else prior.double()
    exact = group_advantage(data.rewards.double(), data.offsets, prior=wide, backend="reference", **options)
    same = group_advantage(data.rewards, data.offsets, prior=prior, backend="reference", **options)
    with poisoned_outputs():
        result = group_advantage(data.rewards, data.offsets, prior=prior, backend="triton", **options)
    assert_as_exact_as(result, same, exact)


def test_same_bits_alone_and_in_a_batch():
    data = ragged_groups(64, 1, 30, seed=6, values=(0.0, 0.3, 1.0))
    whole = shrinkage(*data, reward_range=(0, 1), backend="triton")
    for g in (0, 17, 63):
        begin, end = data.offsets[g], data.offsets[g + 1]
        rewards, prior = data.rewards[begin:end], data.prior[g : g + 1]
        alone = shrinkage(rewards, offsets_of(end[None] - begin), prior, reward_range=(0, 1), backend="triton")
        assert alone.baseline[0] == whole.baseline[g]
        assert alone.gain[0] == whole.gain[g]


def test_equal_rewards_are_exactly_zero():
    rewards, offsets = torch.full((13,), 0.1), torch.tensor([0, 3, 6, 13])
    for estimator in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus"):
        assert not group_advantage(rewards, offsets, estimator=estimator, backend="triton").any()
