"""What every backend plans: the first number of rollouts at which one more does not pay, however many are allowed."""

import pytest
import torch

from v05.kernels import shrinkage
from v05.kernels.shrinkage.reference import lookahead_gain
from v05.kernels.shrinkage.rules import LARGEST
from v05.testing import RaggedGroups, ragged_groups


def check_plans(backend, dtype):
    """Against the rule, asked one rollout after the other; the CPU asks it in float64, so there a tie may tip."""
    data = ragged_groups(300, 0, 12, seed=13, dtype=dtype)
    for cost in (0.0, 1e-12, 1e-5, 1 / 1024, 1 / 256, 1 / 90, 0.3, 1e6):
        for k_init, k_max in ((1, 1), (4, 4), (4, 5), (3, 16), (4, 90), (2, 700)):
            result = shrinkage(*data, cost=cost, k_init=k_init, k_max=k_max, backend=backend)
            planned = result.count.clone()
            for _ in range(k_max):
                gain = lookahead_gain(result.deviation, planned.to(dtype))  # in a range of variance 1
                planned += ((planned < k_max) & (gain > cost)).long()
            planned = torch.where(result.count < k_init, k_init, planned)
            if backend == "cpu" and dtype == torch.float32:
                assert ((result.planned - planned).abs() <= 1).all(), (cost, k_max)
            else:
                assert torch.equal(result.planned, planned), (cost, k_max)


def check_the_largest_k_max(backend, fusion, dtype):
    """The same plans as with a k_max that is just out of reach, at once; without a cost, all of it."""
    data = ragged_groups(100, 0, 9, seed=3, dtype=dtype)
    options = dict(fusion=fusion, cost=1 / 256, backend=backend)
    plans = [shrinkage(*data, k_max=k_max, **options).planned for k_max in (64, 10**9, LARGEST)]
    assert torch.equal(plans[0], plans[1])
    assert torch.equal(plans[0], plans[2])
    assert plans[0].max() < 64
    surprise = RaggedGroups(torch.full((4,), -1, dtype=dtype), torch.tensor([0, 4]), torch.tensor([1], dtype=dtype))
    options |= dict(cost=0.0, k_max=LARGEST)
    assert shrinkage(*surprise, **options).planned.item() == LARGEST
    with pytest.raises(ValueError, match=r"k_max is 2147483648; allowed: 2147483647 or less"):
        shrinkage(*surprise, **options | dict(k_max=LARGEST + 1))


def check_any_range(backend, device, dtype):
    """Plans, trust and errors in units of the range are those of (0, 1), however narrow or wide it is."""
    drawn = ragged_groups(200, 0, 9, seed=5, values=(0.0, 1.0), dtype=dtype)
    data = RaggedGroups(*(values.to(device) for values in drawn))
    options = dict(cost=1 / 256, k_max=64, leave_one_out=True, backend=backend)
    unit = shrinkage(*data, reward_range=(0, 1), **options)
    for width in (2.0**-49, 2.0**-40, 2.0**-23, 2.0**24, 2.0**40, 2.0**49):
        rewards, prior = data.rewards * width, data.prior * width
        result = shrinkage(rewards, data.offsets, prior, reward_range=(0, width), **options)
        assert torch.equal(result.planned, unit.planned), width
        assert torch.equal(result.weight, unit.weight), width
        for name in ("baseline", "rollout_baseline"):
            assert torch.equal(getattr(result, name) / width, getattr(unit, name)), (name, width)
        for name in ("deviation", "mse", "gain"):
            assert torch.equal(getattr(result, name) / width**2, getattr(unit, name)), (name, width)
