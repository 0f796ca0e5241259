"""Calibrated fusion: scipy's posterior, the oracle on ragged groups, its gain and plan, its state, and the records."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from records import recorded_scores
from scipy.stats import betabinom, norm
from spoilt_groups import check_spoilt_groups

from v05.kernels import shrinkage
from v05.kernels.calibration.components import COMPONENTS, PRIOR_COUNT, STEPS, STRENGTHS
from v05.studies.records import PRIORS, RecordsStudy, cells
from v05.testing import assert_as_exact_as, offsets_of, poisoned_outputs, ragged_groups

BACKENDS = ["reference", "cpu"]
TWO, GRADED = (-1.0, 1.0), (-1.0, 0.3, 1.0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def calibrated(data, **options):
    return shrinkage(*data, fusion="calibrated", **options)


def posterior_by_scipy(x, k, centre):
    """Weights of the mixture, posterior mean and variance for sums x of k two-valued rewards in [0, 1]."""
    inside = np.clip(centre, 0.02, 0.98)
    pairs = [(h * inside, h * (1 - inside)) for h in STRENGTHS] + [(np.full_like(inside, 0.5),) * 2]
    likelihood = np.stack([betabinom.pmf(x, k, a, b) for a, b in pairs], 1)  # the binomial factor is common
    weights = np.full(COMPONENTS, 1 / COMPONENTS)
    for _ in range(STEPS):
        share = weights * likelihood
        share /= share.sum(1, keepdims=True)
        soft = share[k > 0].sum(0)
        weights = (soft + PRIOR_COUNT) / (soft + PRIOR_COUNT).sum()
    share = weights * likelihood
    share /= share.sum(1, keepdims=True)
    first = np.stack([(x + a) / (k + a + b) for a, b in pairs], 1)
    second = np.stack([(x + a) * (x + a + 1) / ((k + a + b) * (k + a + b + 1)) for a, b in pairs], 1)
    mean = (share * first).sum(1)
    return soft, mean, (share * second).sum(1) - mean**2, weights, pairs


def two_valued(groups=80, longest=12, seed=0):
    data = ragged_groups(groups, 0, longest, seed=seed, dtype=torch.float64)
    k = data.offsets.diff().numpy()
    x = np.add.reduceat(np.append((data.rewards.numpy() + 1) / 2, 0), data.offsets[:-1].numpy()) * (k > 0)
    return data, x, k, (data.prior.numpy() + 1) / 2


def test_against_scipy(backend):
    data, x, k, centre = two_valued()
    soft, mean, variance, _, _ = posterior_by_scipy(x, k, centre)
    result = calibrated(data, backend=backend)
    assert not result.graded
    np.testing.assert_allclose(result.state.numpy(), soft, rtol=1e-9)
    np.testing.assert_allclose(result.baseline.numpy(), 2 * mean - 1, atol=1e-10)
    np.testing.assert_allclose(result.mse.numpy(), 4 * variance, atol=1e-10)


def test_the_gain_is_the_expected_drop_of_the_posterior_variance(backend):
    """Each next outcome tried, weighed by its predicted probability."""
    data, x, k, centre = two_valued(seed=3)
    _, mean, variance, weights, pairs = posterior_by_scipy(x, k, centre)
    after = np.zeros_like(mean)
    for outcome in (0, 1):
        joint = np.stack([w * betabinom.pmf(x, k, a, b) for w, (a, b) in zip(weights, pairs, strict=True)], 1)
        chance = np.stack([(x + a) / (k + a + b) for a, b in pairs], 1)
        joint *= chance if outcome else 1 - chance
        evidence = joint.sum(1) / np.sum(
            [w * betabinom.pmf(x, k, a, b) for w, (a, b) in zip(weights, pairs, strict=True)], 0
        )
        share = joint / joint.sum(1, keepdims=True)
        y, n = x + outcome, k + 1
        first = np.stack([(y + a) / (n + a + b) for a, b in pairs], 1)
        second = np.stack([(y + a) * (y + a + 1) / ((n + a + b) * (n + a + b + 1)) for a, b in pairs], 1)
        mu = (share * first).sum(1)
        after += evidence * ((share * second).sum(1) - mu**2)
    np.testing.assert_allclose(calibrated(data, backend=backend).gain.numpy(), 4 * (variance - after), atol=1e-10)


def test_graded_rewards_against_scipy(backend):
    """One Gaussian for each strength, with the largest variance for the noise of a reward."""
    data = ragged_groups(60, 1, 9, values=GRADED, dtype=torch.float64)
    k = data.offsets.diff().numpy()
    z, centre = (data.rewards.numpy() + 1) / 2, (data.prior.numpy() + 1) / 2
    m = np.add.reduceat(z, data.offsets[:-1].numpy()) / k
    spreads = [1 / (4 * (1 + h)) for h in (*STRENGTHS, 1.0)]
    centres = [np.clip(centre, 0.02, 0.98)] * len(STRENGTHS) + [np.full_like(centre, 0.5)]
    terms = list(zip(centres, spreads, strict=True))
    likelihood = np.stack([norm.pdf(m, c, np.sqrt(v + 1 / (4 * k))) for c, v in terms], 1)
    weights = np.full(COMPONENTS, 1 / COMPONENTS)
    for _ in range(STEPS):
        share = weights * likelihood / (weights * likelihood).sum(1, keepdims=True)
        weights = (share.sum(0) + PRIOR_COUNT) / (share.sum(0) + PRIOR_COUNT).sum()
    share = weights * likelihood / (weights * likelihood).sum(1, keepdims=True)
    mean = sum(share[:, i] * (4 * k * m + c / v) / (4 * k + 1 / v) for i, (c, v) in enumerate(terms))
    result = calibrated(data, backend=backend)
    assert result.graded
    np.testing.assert_allclose(result.baseline.numpy(), 2 * mean - 1, atol=1e-10)


@pytest.mark.parametrize("values", [TWO, GRADED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [0, 1, 16, 300])
def test_cpu_is_as_exact_as_torch(values, dtype, longest):
    data = ragged_groups(150, 0, longest, values=values, dtype=dtype, seed=longest)
    options = dict(leave_one_out=True, advantages=True, k_init=3, k_max=40)
    exact = calibrated(data._replace(rewards=data.rewards.double(), prior=data.prior.double()), **options)
    same = calibrated(data, backend="reference", **options)
    with poisoned_outputs():
        result = calibrated(data, backend="cpu", **options)
    assert result.baseline.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in result._asdict().items():
        if value.is_floating_point():
            assert_as_exact_as(value, getattr(same, name), getattr(exact, name))
        elif name not in ("planned", "roll_out_more"):  # a gain within rounding of its cost may tip either way
            assert torch.equal(value, getattr(same, name)), name


def test_the_plan_stops_where_a_rollout_gains_no_more_than_it_costs(backend):
    data = ragged_groups(200, 4, 12, dtype=torch.float64, seed=5)
    for cost in (1 / 64, 1 / 256, 1 / 4096):
        result = calibrated(data, cost=cost, k_max=60, backend=backend)
        p = (result.baseline + 1) / 2
        u = p * (1 - p) / (result.mse / 4) - 1
        stopped, grown = result.planned < 60, result.planned > result.count
        for planned, which in ((result.planned, stopped), (result.planned - 1, grown)):
            strength = u + (planned - result.count)
            gain = (result.mse * u / (strength * (strength + 1)))[which]
            assert ((gain <= cost * 1.000001) if which is stopped else (gain > cost * 0.999999)).all()
        assert torch.equal(result.roll_out_more, grown)
    assert calibrated(data, cost=0.0, k_max=20, backend=backend).planned.eq(20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", [-1.0, 1.0])
def test_a_reward_next_to_an_end_is_not_graded(backend, dtype, end):
    """Within a millionth of the range, here 2; as the reference rounds it, in either dtype."""
    data = ragged_groups(9, 2, 5, seed=2, dtype=dtype)
    for steps, graded in ((0.0, False), (1.5e-6, False), (2.5e-6, True), (0.3, True)):
        rewards = data.rewards.clone()
        rewards[3] = end - end * steps
        assert calibrated(data._replace(rewards=rewards), backend=backend).graded.item() is graded


@pytest.mark.parametrize("groups", [1, 70, 20_000])
def test_one_graded_reward_among_all_makes_the_batch_graded(backend, groups):
    data = ragged_groups(groups, 4, 8, seed=9)
    for place in (0, data.rewards.numel() // 2, -1):
        rewards = data.rewards.clone()
        rewards[place] = 0.5
        assert calibrated(data._replace(rewards=rewards), backend=backend).graded
    assert not calibrated(data, backend=backend).graded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [TWO, GRADED])
def test_half_precision_is_read_as_float32(backend, dtype, values):
    data = ragged_groups(60, 0, 9, values=values, dtype=dtype)
    options = dict(leave_one_out=True, advantages=True, backend=backend)
    wide = calibrated(data._replace(rewards=data.rewards.float(), prior=data.prior.float()), **options)
    for ours, theirs in zip(calibrated(data, **options), wide, strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_any_floating_dtype(backend):
    data = ragged_groups(30, 0, 9)
    state = torch.arange(7, dtype=torch.float64)
    given = [calibrated(data, state=state.to(dtype), backend=backend) for dtype in (torch.float32, torch.float16)]
    given.append(calibrated(data, state=state.requires_grad_(), backend=backend))
    given.append(calibrated(data, state=torch.stack([state.detach()] * 2, 1)[:, 0], backend=backend))
    for result in given:
        assert torch.equal(result.state, given[0].state)
        assert torch.equal(result.baseline, given[0].baseline)
    assert not given[0].state.requires_grad


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_with_a_value_that_is_not_finite_are_left_out(monkeypatch, dtype, graded):
    """On the CPU, where values are always checked, they are refused."""
    monkeypatch.setattr("v05.kernels.calibration.op.check_group_values", lambda *_: None)
    check_spoilt_groups("reference", "cpu", graded, dtype)


def test_few_rollouts_plan_the_first_ones(backend):
    data = ragged_groups(30, 0, 3, seed=1)
    assert calibrated(data, k_init=5, backend=backend).planned.eq(5).all()


def test_without_a_reward_the_prior_stands_nearly_alone(backend):
    """Components centred on the prior pull to it, the one that ignores it to the middle."""
    result = calibrated((torch.empty(0), torch.tensor([0, 0, 0]), torch.tensor([0.8, -1.0])), backend=backend)
    share = 1 / COMPONENTS
    expected = [0.8 * (1 - share), -0.96 * (1 - share)]
    assert result.baseline.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.weight.tolist() == [0, 0]
    assert not result.state.any()
    assert not result.graded
    none = calibrated((torch.empty(0), torch.tensor([0]), torch.empty(0)), backend=backend)
    assert none.baseline.numel() == 0
    assert not none.state.any()
    assert not none.graded
    kept = calibrated((torch.empty(0), torch.tensor([0]), torch.empty(0)), state=torch.arange(7.0), backend=backend)
    torch.testing.assert_close(kept.state, 0.9 * torch.arange(7.0))


def test_one_rollout_and_one_prompt(backend):
    options = dict(leave_one_out=True, backend=backend)
    result = calibrated((torch.tensor([1.0]), torch.tensor([0, 1]), torch.tensor([0.5])), k_init=1, **options)
    assert 0.5 < result.baseline.item() < 1
    assert abs(result.rollout_baseline.item() - 0.5) < 0.1  # the prior, and a little of the middle
    assert result.state.sum().item() == pytest.approx(1)


def test_a_left_out_reward_does_not_reach_its_own_baseline(backend):
    """Under a mixture that the batch can hardly move."""
    data = ragged_groups(20, 1, 6, seed=7, dtype=torch.float64)
    settled = torch.full((COMPONENTS,), 1e9, dtype=torch.float64)
    options = dict(leave_one_out=True, state=settled, state_decay=1.0, backend=backend)
    before = calibrated(data, **options).rollout_baseline
    for i in range(0, data.rewards.numel(), 5):
        rewards = data.rewards.clone()
        rewards[i] *= -1
        after = calibrated(data._replace(rewards=rewards), **options).rollout_baseline
        assert after[i].item() == pytest.approx(before[i].item(), abs=1e-7)


def test_a_good_prior_is_learnt_and_remembered(backend):
    """After batches in which the prior was right, a small batch trusts it more than without them."""
    rng = torch.Generator().manual_seed(0)
    p = torch.rand(400, generator=rng, dtype=torch.float64)
    rewards = (torch.rand(400, 4, generator=rng, dtype=torch.float64) < p[:, None]).double().flatten() * 2 - 1
    learnt = calibrated((rewards, torch.arange(0, 1601, 4), 2 * p - 1), backend=backend)
    assert learnt.state[3:6].sum() > 0.8 * learnt.state.sum()  # strengths 10, 30 and 100
    small = (torch.tensor([-1.0] * 4, dtype=torch.float64), torch.tensor([0, 4]), torch.tensor([0.6]).double())
    fresh = calibrated(small, backend=backend)
    carried = calibrated(small, state=learnt.state, backend=backend)
    assert carried.baseline > fresh.baseline
    assert carried.weight < fresh.weight
    torch.testing.assert_close(carried.state.sum(), 0.9 * learnt.state.sum() + 1)
    forgotten = calibrated(small, state=learnt.state, state_decay=0.0, backend=backend)
    assert torch.equal(forgotten.baseline, fresh.baseline)


def test_same_bits_from_any_number_of_threads():
    data = ragged_groups(70_000, 0, 9, seed=1)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(calibrated(data, leave_one_out=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for ours, theirs in zip(runs[0], other, strict=True):
            assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(state=torch.zeros(3)),
            r"state is torch.float32 of shape \[3\]; allowed: a floating dtype of shape \[7\]",
        ),
        (dict(state=torch.tensor([0.0, -1, 0, 0, 0, 0, 0])), r"state\[1\] is -1; allowed: finite, 0 or above"),
        (dict(state=torch.full((7,), float("nan"))), r"state\[0\] is nan"),
        (dict(state_decay=1.5), r"state_decay is 1.5; allowed: 0 to 1"),
        (dict(fusion="v05", state=torch.zeros(7)), r"state is given; fusion 'v05' has none"),
        (dict(fusion="bayes"), r"fusion is 'bayes'; allowed: 'v05', 'calibrated'"),
    ],
)
def test_bad_input_is_named(backend, options, message):
    with pytest.raises(ValueError, match=message):
        shrinkage(*ragged_groups(3, 1, 4), **{"fusion": "calibrated", "backend": backend} | options)


@given(
    lengths=st.lists(st.integers(0, 9), max_size=8),
    graded=st.booleans(),
    seed=st.integers(0, 99),
    decay=st.floats(0, 1),
)
def test_finite_and_equal_to_the_reference(lengths, graded, seed, decay):
    rng = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    z = torch.rand(int(offsets[-1]), generator=rng, dtype=torch.float64)
    rewards = z if graded else (z > 0.5).double()
    prior = torch.rand(len(lengths), generator=rng, dtype=torch.float64)
    options = dict(reward_range=(0.0, 1.0), state=torch.rand(7, generator=rng).double(), state_decay=decay)
    results = [calibrated((rewards, offsets, prior), leave_one_out=True, backend=b, **options) for b in BACKENDS]
    for name in ("baseline", "mse", "gain", "rollout_baseline", "state"):
        ours, theirs = (getattr(result, name) for result in results)
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (results[0].baseline >= 0).all()
    assert (results[0].baseline <= 1).all()


@pytest.mark.parametrize("state", [None, torch.ones(7)], ids=["fresh", "remembered"])
def test_opcheck_and_compile(state):
    data = ragged_groups(20, 0, 5)
    op = torch.ops.v05.calibrated.default
    torch.library.opcheck(op, (*data, state, 0.9, -1.0, 1.0, 1 / 256, 4, 16, True, True, "cpu"))
    torch.compiler.reset()
    options = dict(leave_one_out=True, state=state)
    fast = torch.compile(lambda *given: calibrated(given, **options), fullgraph=True)
    for ours, theirs in zip(fast(*data), calibrated(data, **options), strict=True):
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("prior", PRIORS)
def test_never_worse_on_the_records(prior, k):
    """Priors from accurate to constant and hallucinated, on rewards redrawn: below the group mean and V0.5."""
    found = {cell.estimator: cell.error for cell in cells(recorded_scores(), RecordsStudy(repeats=40), prior, k)}
    assert found["v05_calibrated"] < 0.98 * min(found["dr_grpo"], found["v05"]), found
