"""shrinkage: the paper's worked examples, and the oracle on ragged groups."""

import math

import numpy as np
import pytest
import torch
from plans import check_any_range, check_plans, check_the_largest_k_max
from rounded_ends import check_rounded_ends

from v05.kernels import group_advantage, shrinkage
from v05.kernels.shrinkage.op import FUSIONS
from v05.kernels.shrinkage.rules import Budget, in_dtype, make_budget
from v05.testing import assert_as_exact_as, offsets_of, poisoned_outputs, ragged_groups

BACKENDS = ["reference", "cpu"]
HALF = [torch.bfloat16, torch.float16]
FIELDS = ["mean", "deviation", "weight", "baseline", "mse", "gain"]


def group(*rewards):
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor([0, len(rewards)])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_four_failures_of_a_likely_prompt(backend):
    result = shrinkage(*group(-1, -1, -1, -1), torch.tensor([0.6]), backend=backend)
    expected = dict(
        deviation=2.31,
        weight=0.90234375,
        baseline=-0.84375,
        mse=0.2255859375,
        gain=0.2255859375 - 2.31 / (5 * 2.31 + 1),
    )
    for name, value in expected.items():
        assert getattr(result, name).item() == pytest.approx(value, abs=1e-6), name
    assert result.gain.item() == pytest.approx(0.041522, abs=1e-6)
    assert result.planned.item() == 16
    assert result.roll_out_more.item() is True


def test_two_successes_of_four(backend):
    result = shrinkage(*group(1, 1, -1, -1), torch.tensor([0.6]), backend=backend)
    assert result.deviation.item() == pytest.approx(0.11, abs=1e-6)
    assert result.weight.item() == pytest.approx(0.11 / 0.36, abs=1e-6)
    assert result.gain.item() == pytest.approx(0.11**2 / (1.44 * 1.55), abs=1e-6)
    assert result.roll_out_more.item() is True


def test_three_successes_of_four_trust_the_prior(backend):
    prior = torch.tensor([0.6], dtype=torch.float64)
    result = shrinkage(*group(1, 1, 1, -1), prior, backend=backend)
    assert (result.deviation.item(), result.weight.item(), result.mse.item()) == (0, 0, 0)
    assert result.baseline.item() == prior.item()
    assert result.planned.item() == result.count.item() == 4
    assert result.roll_out_more.item() is False


def test_a_hopeless_prior_stops_exactly_at_sixteen(backend):
    """1 / (15 * 16) > 1/256 >= 1 / (16 * 17), so the cost stops it even where k_max would allow more."""
    rewards = torch.full((16,), -1e6, dtype=torch.float64)
    result = shrinkage(
        rewards[:4], torch.tensor([0, 4]), torch.tensor([1e6]), reward_range=(-1e6, 1e6), k_max=64, backend=backend
    )
    far = shrinkage(
        *group(-1, -1, -1, -1), torch.tensor([1.0], dtype=torch.float64), k_max=64, cost=1 / 256, backend=backend
    )
    assert result.planned.item() == far.planned.item()  # scale does not matter
    assert far.planned.item() in (15, 16)
    assert float(far.gain) > 1 / 256


@pytest.mark.parametrize("dtype", HALF)
def test_the_ends_of_a_range_as_half_rewards_hold_them(backend, dtype):
    check_rounded_ends(backend, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_beyond_a_rounded_end_values_are_refused(backend, dtype, fusion):
    ends = torch.tensor([0.1, 1.1], dtype=dtype)
    offsets, options = torch.tensor([0, 2]), dict(reward_range=(0.1, 1.1), fusion=fusion, backend=backend)
    for place, step in ((0, -1), (1, 1)):
        rewards = ends.clone()
        rewards[place] = torch.nextafter(ends[place], torch.tensor(2.0 * step, dtype=dtype))
        with pytest.raises(ValueError, match=rf"rewards\[{place}\] is "):
            shrinkage(rewards, offsets, torch.tensor([0.5]), **options)
        with pytest.raises(ValueError, match=r"prior\[0\] is "):
            shrinkage(ends, offsets, torch.tensor([0.6 + 0.52 * step]), **options)
    message = r"reward_range is \(1000.0, 1000.1\), in torch.\w+ \(1000.0, 1000.0\); allowed: ends that differ"
    with pytest.raises(ValueError, match=message):
        shrinkage(1000 * ends[:0], offsets[:1], torch.empty(0), **options | dict(reward_range=(1000.0, 1000.1)))


def test_ends_are_rounded_as_torch_rounds():
    values = [0.1, 1.1, -0.3, 1.0, 0.0, 1e-7, 65519.0, 3e-8, -1e5, 1 + 2**-8, 1 + 3 * 2**-8, 1e30, 2.0**-140]
    for dtype in HALF:
        for value in values:
            held = torch.tensor(value, dtype=torch.float64).to(dtype).item()
            expected = held if math.isfinite(held) else value
            assert in_dtype(Budget(value, 3e38, 0.0, 1, 1), dtype).low == expected


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_k_max_there_is(backend, fusion, dtype):
    check_the_largest_k_max(backend, fusion, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_is_made_as_if_step_by_step(backend, dtype):
    check_plans(backend, dtype)


def test_plan_is_the_first_count_whose_gain_is_below_the_cost(backend):
    data = ragged_groups(400, 4, 12, seed=3, dtype=torch.float64)
    result = shrinkage(*data, k_max=40, cost=1 / 500, backend=backend)
    for count, d, planned in zip(
        result.count.tolist(), result.deviation.tolist(), result.planned.tolist(), strict=True
    ):
        k = count
        while k < 40 and d * d / ((k * d + 1) * ((k + 1) * d + 1)) > 1 / 500:
            k += 1
        assert planned == k


@pytest.mark.parametrize("cost", [0.0, 1e-12, 1 / 1024, 1 / 90, 0.3, 1e6])
def test_plans_at_any_cost(cost):
    data = ragged_groups(500, 0, 12, seed=13, dtype=torch.float64)
    plan = shrinkage(*data, cost=cost, k_max=90, backend="cpu").planned
    assert torch.equal(plan, shrinkage(*data, cost=cost, k_max=90, backend="reference").planned)


def test_cost_means_the_same_in_every_reward_range(backend):
    data = ragged_groups(200, 1, 12, seed=5, dtype=torch.float64)
    signed = shrinkage(*data, backend=backend)
    unit = shrinkage((data.rewards + 1) / 2, data.offsets, (data.prior + 1) / 2, reward_range=(0, 1), backend=backend)
    assert torch.equal(signed.planned, unit.planned)
    torch.testing.assert_close(signed.weight, unit.weight)
    torch.testing.assert_close(signed.baseline, unit.baseline * 2 - 1)
    torch.testing.assert_close(signed.mse, unit.mse * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_range_of_any_width(backend, dtype):
    check_any_range(backend, "cpu", dtype)


def test_empty_and_unfinished_groups(backend):
    offsets = torch.tensor([0, 0, 2, 2])
    result = shrinkage(torch.tensor([-1.0, -1.0]), offsets, torch.tensor([0.5, 0.9, -0.25]), k_init=6, backend=backend)
    assert result.count.tolist() == [0, 2, 0]
    assert result.planned.tolist() == [6, 6, 6]
    assert result.roll_out_more.all()
    assert result.baseline[[0, 2]].tolist() == [0.5, -0.25]
    assert result.weight[[0, 2]].tolist() == [0, 0]
    assert all(torch.isfinite(getattr(result, name)).all() for name in FIELDS)


def test_no_groups_at_all(backend):
    result = shrinkage(torch.empty(0), torch.tensor([0]), torch.empty(0), leave_one_out=True, backend=backend)
    assert all(value.numel() == 0 for value in result if value is not None)


def test_advantages_come_with_the_statistics(backend):
    data = ragged_groups(60, 0, 7, seed=3)
    shared = shrinkage(*data, advantages=True, backend=backend)
    torch.testing.assert_close(shared.advantages, group_advantage(data.rewards, data.offsets, prior=data.prior))
    own = shrinkage(*data, advantages=True, leave_one_out=True, backend=backend)
    torch.testing.assert_close(own.advantages, data.rewards - own.rollout_baseline)
    assert shrinkage(*data, backend=backend).advantages is None


def test_leave_one_out_equals_fusion_without_the_rollout(backend):
    data = ragged_groups(60, 0, 7, seed=2, values=(-1.0, 0.25, 1.0), dtype=torch.float64)
    result = shrinkage(*data, leave_one_out=True, backend=backend)
    for g, (begin, end) in enumerate(zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist(), strict=True)):
        for i in range(begin, end):
            rest = torch.cat([data.rewards[begin:i], data.rewards[i + 1 : end]])
            alone = shrinkage(rest, torch.tensor([0, len(rest)]), data.prior[g : g + 1])
            assert result.rollout_baseline[i].item() == pytest.approx(alone.baseline.item(), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1.0), (0.0, 0.1, 0.7, 1.0)])
def test_cpu_is_as_exact_as_torch(dtype, values):
    data = ragged_groups(3000, 0, 20, seed=11, values=values, dtype=dtype)
    options = dict(reward_range=(min(values), max(values)), leave_one_out=True, advantages=True)
    exact = shrinkage(*(t.double() if t.is_floating_point() else t for t in data), backend="reference", **options)
    same = shrinkage(*data, backend="reference", **options)
    with poisoned_outputs():
        result = shrinkage(*data, backend="cpu", **options)
    assert result.baseline.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name in [*FIELDS, "rollout_baseline", "advantages"]:
        assert_as_exact_as(getattr(result, name), getattr(same, name), getattr(exact, name))
    assert torch.equal(result.count, exact.count)
    near = (exact.planned - result.planned).abs()
    assert near.max() <= 1  # rounding may move a gain across the cost
    assert (near == 0).float().mean() > 0.999
    assert torch.equal(result.roll_out_more, result.planned > result.count)


def test_strided_inputs_and_a_prior_of_another_dtype(backend):
    data = ragged_groups(50, 1, 9, seed=8)
    wide = torch.stack([data.rewards, torch.full_like(data.rewards, math.nan)], 1)
    result = shrinkage(wide[:, 0], data.offsets, data.prior.double(), backend=backend)
    torch.testing.assert_close(result, shrinkage(*data, backend="reference"))


def test_same_bits_whatever_else_is_in_the_batch_and_however_many_threads():
    data = ragged_groups(40_000, 1, 12, seed=4, values=(0.0, 0.3, 1.0))
    whole = shrinkage(*data, reward_range=(0, 1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.testing.assert_close(shrinkage(*data, reward_range=(0, 1)), whole, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    for g in range(0, 40_000, 2500):
        begin, end = data.offsets[g], data.offsets[g + 1]
        alone = shrinkage(
            data.rewards[begin:end], offsets_of(end[None] - begin), data.prior[g : g + 1], reward_range=(0, 1)
        )
        assert all(torch.equal(getattr(alone, name)[0], getattr(whole, name)[g]) for name in [*FIELDS, "planned"])


def test_against_numpy_written_from_the_paper():
    data = ragged_groups(500, 1, 16, seed=21, dtype=torch.float64)
    result = shrinkage(*data)
    bounds = data.offsets.tolist()
    for g in range(500):
        rewards, prior = data.rewards[bounds[g] : bounds[g + 1]].numpy(), float(data.prior[g])
        k, gap = len(rewards), np.mean(rewards) - prior
        d = max(0.0, gap**2 - 1 / k)
        w = d / (d + 1 / k)
        assert float(result.baseline[g]) == pytest.approx(w * np.mean(rewards) + (1 - w) * prior, abs=1e-12)
        assert float(result.mse[g]) == pytest.approx(w**2 / k + (1 - w) ** 2 * d, abs=1e-12)


def test_opcheck_and_compile():
    rewards, offsets, prior = ragged_groups(20, 0, 9)
    for leave_one_out in (False, True):
        arguments = (
            rewards,
            offsets,
            prior,
            *make_budget((-1.0, 1.0), 1 / 256, 4, 16),
            leave_one_out,
            not leave_one_out,
            "cpu",
        )
        torch.library.opcheck(torch.ops.v05.shrinkage.default, arguments)

    def step(rewards, offsets, prior):
        result = shrinkage(rewards, offsets, prior, leave_one_out=True)
        return result.baseline * 2, result.roll_out_more, result.rollout_baseline

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for groups in (20, 33):
        data = ragged_groups(groups, 0, 9, seed=groups)
        torch.testing.assert_close(compiled(*data), step(*data))
