"""shrinkage and group_advantage on the device against float64, from no groups to more than a grid's axis holds."""

import pytest
import torch
from common import (
    BACKENDS,
    COMBINATIONS,
    DEVICE,
    DRY_RUN,
    DTYPES,
    KERNELS,
    assert_same_bits,
    compare,
    needs_gpu,
    on_device,
    run_advantage,
    run_shrinkage,
    scaled,
    widened,
)
from plans import check_any_range
from spoilt_groups import check_spoilt_groups

from v05.kernels import group_advantage, shrinkage
from v05.testing import RaggedGroups, offsets_of, ragged_groups

VALUES = (-1.0, 0.3, 1.0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def compare_shrinkage(backend, data, **options):
    """Plans are held between those of a cost slightly higher and slightly lower: rounding decides on the edge."""
    result = compare(run_shrinkage, backend, data, but=("planned", "roll_out_more"), **options)
    fewest, most = (
        run_shrinkage("reference", widened(data), cost=(1 + gap) / 256, **options)["planned"] for gap in (3e-5, -3e-5)
    )
    assert ((fewest <= result["planned"]) & (result["planned"] <= most)).all()
    assert torch.equal(result["roll_out_more"], result["planned"] > result["count"])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [0, 1, 16, 300])
def test_shrinkage(backend, dtype, longest):
    data = on_device(ragged_groups(scaled(1003, 53), 0, longest, seed=longest, values=VALUES, dtype=dtype))
    compare_shrinkage(backend, data, leave_one_out=True, advantages=True, k_init=3, k_max=20)


@pytest.mark.parametrize("options", [dict(), dict(leave_one_out=True), dict(advantages=True)])
def test_shrinkage_without_what_was_not_asked_for(backend, options):
    compare_shrinkage(backend, on_device(ragged_groups(97, 0, 9, values=VALUES)), **options)


def compare_calibrated(backend, data, **options):
    """The mixture is fitted to all groups, which adds up their rounding; a plan within rounding of its cost may tip."""
    result = compare(
        run_shrinkage, backend, data, ("planned", "roll_out_more"), floors=20, fusion="calibrated", **options
    )
    assert torch.equal(result["roll_out_more"], result["planned"] > result["count"])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [VALUES, (-1.0, 1.0)])
@pytest.mark.parametrize("groups", [1, 1003, 20_000])
def test_calibrated_fusion(backend, dtype, values, groups):
    data = on_device(ragged_groups(scaled(groups, min(groups, 53)), 0, 16, seed=7, values=values, dtype=dtype))
    for state in (None, torch.arange(7.0, device=DEVICE)):
        compare_calibrated(backend, data, leave_one_out=True, advantages=True, state=state)


@pytest.mark.parametrize("values", [VALUES, (-1.0, 1.0)])
def test_calibrated_fusion_of_more_groups_than_registers_hold(backend, values):
    data = on_device(ragged_groups(scaled(150_000, 90), 0, 9, seed=8, values=values))
    compare_calibrated(backend, data, leave_one_out=True)


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_calibrated_fusion_on_many_streams_and_in_a_graph(backend):
    """Its fit may be of blocks that wait for each other: more of them than a GPU holds at a time."""
    batches = [on_device(ragged_groups(size, 0, 9, seed=size, values=VALUES)) for size in (5_000, 70_000) * 6]
    options = dict(fusion="calibrated", leave_one_out=True)
    expected = [run_shrinkage(backend, data, **options) for data in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    for _ in range(5):
        results = []
        for stream, data in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                results.append(run_shrinkage(backend, data, **options))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results += [run_shrinkage(backend, data, **options) for data in batches[:2]]
    graph.replay()
    torch.cuda.synchronize()
    for result, same in zip(results, expected + expected[:2], strict=True):
        assert_same_bits(result, same)


def test_one_graded_reward_among_all_makes_the_batch_graded(backend):
    data = on_device(ragged_groups(scaled(20_000, 530), 1, 4, seed=9))
    for place, value in ((0, 0.3), (-1, 0.3), (-1, 1 - 2.5e-6), (-1, 1 - 1.5e-6), (-1, 1.0)):
        rewards = data.rewards.clone()
        rewards[place] = value
        result = compare_calibrated(backend, data._replace(rewards=rewards))
        assert result["graded"].item() is (value < 1 - 2e-6)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_with_a_value_that_is_not_finite_are_left_out(backend, dtype, graded):
    if DRY_RUN and backend != "triton":
        pytest.skip("values are always checked on the CPU")
    check_spoilt_groups(backend, DEVICE, graded, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_range_of_any_width(backend, dtype):
    check_any_range(backend, DEVICE, dtype)


def test_calibrated_fusion_of_nothing(backend):
    state = torch.arange(7.0, device=DEVICE)
    for lengths in ([], [0], [0, 0, 0]):
        offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
        data = on_device(RaggedGroups(torch.empty(0), offsets, torch.full((len(lengths),), 0.25)))
        result = compare_calibrated(backend, data, state=state, leave_one_out=True)
        assert not result["graded"]
        torch.testing.assert_close(result["state"], 0.9 * state)


def test_calibrated_fusion_of_very_many_rollouts(backend):
    """Eight factors as large as these are no float."""
    rewards = torch.ones(scaled(100_000, 40) + 4, device=DEVICE)
    rewards[-3:] = -1
    offsets = torch.tensor([0, len(rewards) - 4, len(rewards)], device=DEVICE)
    prior = torch.tensor([0.3, 0.2], device=DEVICE)
    result = run_shrinkage(backend, (rewards, offsets, prior), fusion="calibrated", leave_one_out=True)
    assert result["baseline"][0] > 0.9
    assert all(result[name].isfinite().all() for name in ("baseline", "state", "rollout_baseline"))


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_calibrated_fusion_is_three_launches(backend):
    data = on_device(ragged_groups(300, 0, 21, values=VALUES, dtype=torch.bfloat16))
    data = data._replace(prior=data.prior.float())
    options = dict(fusion="calibrated", leave_one_out=True, advantages=True, state=torch.ones(7, device=DEVICE))
    run_shrinkage(backend, data, **options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run_shrinkage(backend, data, **options)
        torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not launched:
        pytest.skip("the profiler sees no launch here")
    assert len(launched) == 3, launched


@pytest.mark.parametrize(("estimator", "scale"), COMBINATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_advantage(backend, estimator, scale, dtype):
    data = on_device(ragged_groups(scaled(1003, 53), 0, 21, seed=4, values=VALUES, dtype=dtype))
    compare(run_advantage, backend, data, estimator=estimator, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 300, 65_536])
def test_statistics_over_tokens(backend, dtype, groups):
    """Pooled by one block, by one, and by many; the first two thirds of the rollouts have no tokens."""
    data = on_device(ragged_groups(scaled(groups, min(groups, 900)), 4, 16, seed=5, values=VALUES, dtype=dtype))
    lengths = torch.randint(1, 900, data.rewards.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    lengths[: len(lengths) * 2 // 3] = 0
    compare(run_advantage, backend, data, estimator="reinforce_plus_plus", lengths=lengths)
    compare(run_advantage, backend, data, estimator="v05", scale="batch")


def test_statistics_of_no_tokens(backend):
    data = on_device(ragged_groups(30, 1, 9, values=VALUES))
    result = run_advantage(backend, data, "reinforce_plus_plus", lengths=torch.zeros_like(data.rewards))
    assert torch.equal(result["advantages"], data.rewards - data.rewards[0])


def test_more_groups_than_a_grid_axis_holds_blocks(backend):
    """65,535 blocks of 32 groups."""
    data = on_device(ragged_groups(scaled(65_536 * 32 + 5, 700), 0, 2, seed=6, dtype=torch.float64))
    compare_shrinkage(backend, data, advantages=True)
    compare(run_advantage, backend, data, estimator="rloo")


def test_one_group_of_everything(backend):
    size = scaled(1_000_003, 2003)
    rewards = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = on_device(RaggedGroups(rewards, torch.tensor([0, 0, size]), torch.tensor([0.2, 0.9]).double()))
    compare_shrinkage(backend, data, leave_one_out=True)
    compare(run_advantage, backend, data, estimator="grpo")


def test_nothing_to_do(backend):
    for lengths in ([], [0], [0, 0, 0]):
        offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
        data = on_device(RaggedGroups(torch.empty(0), offsets, torch.full((len(lengths),), 0.25)))
        result = compare_shrinkage(backend, data, leave_one_out=True, advantages=True)
        assert (result["baseline"] == 0.25).all()
        for estimator in ("v05", "grpo", "reinforce_plus_plus"):
            assert compare(run_advantage, backend, data, estimator=estimator)["advantages"].numel() == 0


def test_equal_rewards_are_exactly_zero(backend):
    data = on_device(RaggedGroups(torch.full((13,), 0.1), torch.tensor([0, 3, 6, 13]), torch.zeros(3)))
    for estimator in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus"):
        assert not run_advantage(backend, data, estimator)["advantages"].any(), estimator


def test_a_large_batch_of_equal_rewards_is_exactly_zero(backend):
    size = scaled(650_000, 9_000)
    data = on_device(RaggedGroups(torch.full((size,), 0.1), torch.tensor([0, size]), torch.zeros(1)))
    for lengths in (None, torch.arange(size, device=DEVICE) % 7):
        assert not run_advantage(backend, data, "reinforce_plus_plus", lengths=lengths)["advantages"].any()


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_in_any_company(backend):
    data = ragged_groups(200, 0, 40, seed=6, values=VALUES)
    rewards = list(data.rewards.split(data.offsets.diff().tolist()))
    options = dict(leave_one_out=True, advantages=True)
    whole = run_shrinkage(backend, on_device(data), **options)
    scaled_by_std = run_advantage(backend, on_device(data), "grpo")["advantages"]
    ids = torch.arange(200).repeat_interleave(data.offsets.diff())
    for seed in range(scaled(20, 3)):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[: 200 - 7 * seed]
        pieces = torch.cat([rewards[g] for g in order])
        other = on_device(RaggedGroups(pieces, offsets_of(data.offsets.diff()[order]), data.prior[order]))
        source = torch.cat([(ids == g).nonzero()[:, 0] for g in order]).to(DEVICE)
        groups = order.to(DEVICE)
        expected = {k: v[source if k in ("rollout_baseline", "advantages") else groups] for k, v in whole.items()}
        assert_same_bits(run_shrinkage(backend, other, **options), expected)
        assert torch.equal(run_advantage(backend, other, "grpo")["advantages"], scaled_by_std[source])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rewards=[0.0, float("nan"), 1, 1]), r"rewards\[1\] is nan \(group 0\); allowed: -1 to 1"),
        (dict(rewards=[0.0, 0, 0, 1.5]), r"rewards\[3\] is 1.5 \(group 2\)"),
        (dict(prior=[0.0, 0, -2]), r"prior\[2\] is -2; allowed: -1 to 1"),
        (dict(offsets=[1, 2, 2, 4]), r"offsets\[0\] is 1; allowed: 0"),
        (dict(offsets=[0, 3, 2, 4]), r"offsets\[2\] is 2; allowed: 3"),
        (dict(offsets=[0, 2, 2, 5]), r"offsets\[3\] is 5; allowed: 4"),
    ],
)
def test_bad_values_are_named_where_asked_for(backend, change, message):
    given = dict(rewards=[0.0, 0, 1, 1], offsets=[0, 2, 2, 4], prior=[0.0, 0, 0]) | change
    data = on_device(RaggedGroups(*(torch.tensor(values) for values in given.values())))
    with pytest.raises(ValueError, match=message):
        shrinkage(*data, check_values=True, backend=backend)
    with pytest.raises(ValueError, match=message):
        group_advantage(data.rewards, data.offsets, prior=data.prior, check_values=True, backend=backend)
