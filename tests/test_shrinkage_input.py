"""shrinkage: what is refused, and by which words; any input gives a right answer or a clear error."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v05.kernels import shrinkage
from v05.testing import offsets_of, ragged_groups

BACKENDS = ["reference", "cpu"]
FIELDS = ["mean", "deviation", "weight", "baseline", "mse", "gain"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rewards=[1, math.nan, 1, 1]), r"rewards\[1\] is nan \(group 0\); allowed: -1 to 1"),
        (dict(rewards=[1, 1, 1, 1.5]), r"rewards\[3\] is 1.5 \(group 1\)"),
        (dict(prior=[0.5, 1.5]), r"prior\[1\] is 1.5; allowed: -1 to 1$"),
        (dict(reward_range=(0, 1)), r"rewards\[2\] is -1 \(group 1\); allowed: 0 to 1$"),
        (dict(prior=[math.inf, 0.5]), r"prior\[0\] is inf"),
        (dict(prior=[0.5]), "prior has 1 elements; allowed: 2"),
        (dict(offsets=[1, 2, 4]), r"offsets\[0\] is 1; allowed: 0"),
        (dict(offsets=[0, 2, 3]), r"offsets\[2\] is 3; allowed: 4"),
        (dict(offsets=[0, 5, 4]), r"offsets\[2\] is 4; allowed: 5"),
        (dict(offsets=[0, -3, 4]), r"offsets\[1\] is -3; allowed: 0"),
        (dict(offsets=[]), "offsets has shape"),
        (dict(k_init=0), "k_init is 0"),
        (dict(k_init=9, k_max=8), "k_init is 9 and k_max 8"),
        (dict(cost=-1), "cost is -1"),
        (dict(cost=math.nan), "cost is nan"),
        (dict(reward_range=(1, 1)), "reward_range"),
        (dict(reward_range=(0, 1e-30)), r"is \(0.0, 1e-30\); allowed: ends that are 1e-15 to 1e\+15 apart"),
        (dict(reward_range=(-1e300, 1e300)), "allowed: ends that are 1e-15 to"),
        (dict(fusion="magic"), "fusion is 'magic'; allowed: 'v05'"),
        (dict(backend="tpu"), "backend is 'tpu'"),
    ],
)
def test_bad_input_is_named(backend, change, message):
    arguments = dict(rewards=[1.0, 1.0, -1.0, -1.0], offsets=[0, 2, 4], prior=[0.5, -0.5], backend=backend) | change
    rewards, prior = torch.tensor(arguments.pop("rewards")), torch.tensor(arguments.pop("prior"))
    offsets = torch.tensor(arguments.pop("offsets"), dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        shrinkage(rewards.float(), offsets, prior.float(), **arguments)


def test_wrong_dtypes_and_devices():
    rewards, offsets, prior = ragged_groups(3, 2, 3)
    with pytest.raises(TypeError, match=r"rewards is torch.int64"):
        shrinkage(rewards.long(), offsets, prior)
    with pytest.raises(TypeError, match=r"offsets is torch.int32; allowed: torch.int64"):
        shrinkage(rewards, offsets.int(), prior)
    with pytest.raises(ValueError, match="prior is on meta"):
        shrinkage(rewards, offsets, prior.to("meta"))
    with pytest.raises(RuntimeError, match="'triton' cannot run shrinkage here"):
        shrinkage(rewards, offsets, prior, backend="triton")


@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    corrupt=st.sampled_from(["none", "nan", "range", "first", "last", "order", "prior"]),
    seed=st.integers(0, 2**20),
)
def test_malformed_or_finite(lengths, corrupt, seed):
    """Whatever comes in, a clear error or the right, finite answer comes out."""
    rng = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    rewards = torch.rand(int(offsets[-1]), generator=rng) * 2 - 1
    prior = torch.rand(len(lengths), generator=rng) * 2 - 1
    good = True
    if corrupt in ("nan", "range") and rewards.numel():
        rewards[int(torch.randint(rewards.numel(), (1,), generator=rng))] = math.nan if corrupt == "nan" else 3.0
        good = False
    elif corrupt == "prior" and prior.numel():
        prior[-1], good = -math.inf, False
    elif corrupt in ("first", "last"):
        offsets[0 if corrupt == "first" else -1] += 1
        good = False
    elif corrupt == "order" and len(lengths) > 1:
        offsets[1], good = rewards.numel() + 7, False
    if not good:
        with pytest.raises(ValueError, match="allowed"):
            shrinkage(rewards, offsets, prior)
        return
    result, exact = (
        shrinkage(rewards, offsets, prior),
        shrinkage(rewards.double(), offsets, prior.double(), backend="reference"),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(result, name), getattr(exact, name).float(), atol=2e-6, rtol=2e-6)
