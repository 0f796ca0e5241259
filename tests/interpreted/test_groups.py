"""shrinkage and group_advantage in Triton against the reference, on ragged groups with poisoned outputs."""

import pytest
import torch
from plans import check_any_range, check_plans, check_the_largest_k_max
from rounded_ends import check_rounded_ends
from spoilt_groups import check_spoilt_groups

from v05.kernels import group_advantage, shrinkage
from v05.kernels.advantage import triton_moments
from v05.kernels.advantage.estimators import ESTIMATORS, SCALES
from v05.kernels.advantage.reference import batch_moments
from v05.kernels.calibration import triton as calibration
from v05.kernels.shrinkage.op import FUSIONS
from v05.testing import assert_as_exact_as, offsets_of, poisoned_outputs, ragged_groups

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (-1.0, 0.3, 1.0)])
@pytest.mark.parametrize("own", [False, True])
def test_calibrated_fusion(dtype, values, own):
    data = ragged_groups(41, 0, 13, seed=3, values=values, dtype=dtype)
    options = dict(fusion="calibrated", leave_one_out=own, advantages=True, state=torch.arange(7.0) if own else None)
    exact = shrinkage(data.rewards.double(), data.offsets, data.prior.double(), backend="reference", **options)
    same = shrinkage(*data, backend="reference", **options)
    with poisoned_outputs():
        result = shrinkage(*data, backend="triton", **options)
    for name, value in result._asdict().items():
        if value is not None and value.is_floating_point():
            assert_as_exact_as(value, getattr(same, name), getattr(exact, name))
        elif value is not None:
            assert torch.equal(value, getattr(same, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_graded_reward_among_all(dtype, monkeypatch):
    """Nearer to an end than a millionth of the range it counts as the end. It lies beyond the fit's first groups."""
    monkeypatch.setattr(calibration, "BLOCK_FIT", {dtype: 16})
    data = ragged_groups(40, 1, 4, seed=9, dtype=dtype)
    for value, graded in ((1.0, False), (1 - 1.5e-6, False), (1 - 2.5e-6, True), (0.5, True)):
        rewards = data.rewards.clone()
        rewards[-1] = value
        assert shrinkage(rewards, *data[1:], fusion="calibrated", backend="triton").graded.item() is graded


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_groups_with_a_value_that_is_not_finite_are_left_out(dtype, graded):
    check_spoilt_groups("triton", "cpu", graded, dtype)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_k_max_there_is(fusion, dtype):
    check_the_largest_k_max("triton", fusion, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_is_made_as_if_step_by_step(dtype):
    check_plans("triton", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_range_of_any_width(dtype):
    check_any_range("triton", "cpu", dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_the_ends_of_a_range_as_half_rewards_hold_them(dtype):
    check_rounded_ends("triton", dtype)


def test_calibrated_fusion_of_nothing():
    for groups in (0, 3):
        given = (torch.empty(0), torch.zeros(groups + 1, dtype=torch.int64), torch.zeros(groups))
        with poisoned_outputs():
            result = shrinkage(*given, fusion="calibrated", state=torch.arange(7.0), backend="triton")
        assert not result.graded
        torch.testing.assert_close(result.state, 0.9 * torch.arange(7.0))


def test_no_groups():
    result = shrinkage(torch.empty(0), torch.tensor([0]), torch.empty(0), backend="triton")
    assert result.baseline.numel() == 0


ALLOWED = [
    (name, scale) for name in ESTIMATORS for scale in SCALES if "none" in (scale, ESTIMATORS[name].scale.name.lower())
]


def compare_advantage(data, estimator, **options):
    prior = data.prior if ESTIMATORS[estimator].needs_prior else None
    if ESTIMATORS[estimator].needs_lengths:
        options = dict(lengths=torch.arange(data.rewards.numel()) % 7) | options
    options["estimator"] = estimator
    if ESTIMATORS[estimator].needs_lengths:
        options["lengths"] = torch.arange(len(data.rewards)) % 7
    wide = None if prior is None else prior.double()
    exact = group_advantage(data.rewards.double(), data.offsets, prior=wide, backend="reference", **options)
    same = group_advantage(data.rewards, data.offsets, prior=prior, backend="reference", **options)
    with poisoned_outputs():
        result = group_advantage(data.rewards, data.offsets, prior=prior, backend="triton", **options)
    assert_as_exact_as(result, same, exact)
    return result


@pytest.mark.parametrize(("estimator", "scale"), ALLOWED)
def test_advantage(estimator, scale):
    compare_advantage(ragged_groups(45, 0, 21, seed=4, values=(-1.0, 0.3, 1.0)), estimator, scale=scale)


def test_an_implied_std_of_0_leaves_the_advantage_unscaled():
    data = ragged_groups(70, 0, 3, seed=4, values=(-1.0, 1.0))
    assert compare_advantage(data, "dr_grpo", scale="baseline", eps=0.0).isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_advantage_of_half_precision(estimator, dtype):
    data = ragged_groups(45, 0, 21, seed=4, values=(-1.0, 0.3, 1.0), dtype=dtype)
    assert compare_advantage(data, estimator).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("groups", [1, 900])
@pytest.mark.parametrize("by_length", [False, True])
def test_moments_of_the_batch(groups, by_length, dtype):
    """900 groups are more than one program pools. A whole part of the batch has length 0, where there are lengths."""
    data = ragged_groups(groups, 9, 21, seed=2, values=(-1.0, 0.3, 0.9), dtype=dtype)
    lengths = torch.randint(0, 900, data.rewards.shape, generator=torch.Generator().manual_seed(0))
    lengths[: len(lengths) * 2 // 3] = 0
    compare_advantage(data, "reinforce_plus_plus", lengths=lengths if by_length else None)


@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_moments_of_one_value_alone(value):
    """Equal rewards have a mean without rounding and are left unscaled, in however many parts; NaN stays NaN."""
    for n in (1, 2, 3 * triton_moments.BLOCK + 7):
        for lengths in (None, torch.ones(n), torch.zeros(n), torch.linspace(0, 3, n)):
            mean, std = triton_moments.batch_moments(torch.full((n,), value), lengths, 1e-6)
            expected = batch_moments(torch.full((n,), value), lengths, 1e-6)
            torch.testing.assert_close(torch.stack([mean, std]), torch.stack(expected), rtol=0, atol=0, equal_nan=True)


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
