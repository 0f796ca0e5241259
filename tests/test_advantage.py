"""group_advantage: hand-computed numbers, the oracle on ragged groups, exact zeros, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v05.integrations.reward_range import widened
from v05.kernels import group_advantage, shrinkage
from v05.kernels.advantage.estimators import ESTIMATORS, SCALES, resolve
from v05.testing import assert_as_exact_as, offsets_of, poisoned_outputs, ragged_groups

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def combinations():
    for estimator, defined in ESTIMATORS.items():
        for scale in SCALES:
            if scale == "none" or defined.scale.name == "NONE":
                yield estimator, scale


def advantages(data, estimator, backend=None, **options):
    defined = ESTIMATORS[estimator]
    options |= dict(prior=data.prior if defined.needs_prior else None)
    options = dict(lengths=torch.arange(len(data.rewards)) % 7 if defined.needs_lengths else None) | options
    return group_advantage(data.rewards, data.offsets, estimator=estimator, backend=backend, **options)


def test_a_range_is_widened_at_either_end_and_never_narrowed():
    assert widened((-1.0, 1.0), torch.tensor([-3.0, 0.5])) == (-3.0, 1.0)
    assert widened((-1.0, 1.0), torch.tensor([0.0, 2.0])) == (-1.0, 2.0)
    assert widened((-1.0, 1.0), torch.tensor([])) == (-1.0, 1.0)


def test_hand_computed(backend):
    rewards = torch.tensor([1.0, -1, -1, -1, 1, 1, -1], dtype=torch.float64)
    offsets = torch.tensor([0, 4, 7])

    def of(estimator, **options):
        return group_advantage(rewards, offsets, estimator=estimator, backend=backend, **options).tolist()

    third = 1 / 3
    assert of("dr_grpo") == pytest.approx([1.5, -0.5, -0.5, -0.5, 2 * third, 2 * third, -4 * third])
    assert of("grpo", eps=0) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5] + [2 * third / math.sqrt(4 / 3)] * 2 + [-4 * third / math.sqrt(4 / 3)]
    )
    assert of("rloo") == pytest.approx([2, -2 * third, -2 * third, -2 * third, 1, 1, -2])
    mean = -1 / 7
    std = math.sqrt((3 * (1 - mean) ** 2 + 4 * (1 + mean) ** 2) / 6)
    batch = [(r - mean) / std for r in rewards.tolist()]
    assert of("reinforce_plus_plus", eps=0) == pytest.approx(batch)
    assert of("dr_grpo", scale="batch", eps=0)[0] == pytest.approx(1.5 / std)
    prior = torch.tensor([0.6, 0.6], dtype=torch.float64)
    fused = shrinkage(rewards, offsets, prior).baseline
    assert of("v05", prior=prior) == pytest.approx((rewards - fused.repeat_interleave(torch.tensor([4, 3]))).tolist())
    implied = math.sqrt((1 - fused[1].item()) * (fused[1].item() + 1))
    assert of("v05", prior=prior, scale="baseline")[4] == pytest.approx((1 - fused[1].item()) / implied)


def test_an_implied_std_of_0_leaves_the_advantage_unscaled(backend):
    rewards, offsets = torch.tensor([1.0, 1, -1, 1]), torch.tensor([0, 2, 4])
    made = group_advantage(rewards, offsets, estimator="dr_grpo", scale="baseline", eps=0.0, backend=backend)
    assert made.tolist() == [0, 0, -1, 1]
    options = dict(prior=torch.tensor([-1.0, -1.0]), scale="baseline", eps=0.0, backend=backend)
    assert group_advantage(torch.tensor([-1.0, 1]), torch.tensor([0, 1, 2]), **options)[0] == 0


def test_baselines_of_the_batch_by_hand(backend):
    rewards = torch.tensor([1.0, -1, 1, 1, 1, -1, -1, -1, 1], dtype=torch.float64)
    offsets, lengths = torch.tensor([0, 2, 5, 8, 9]), torch.tensor([1.0, 3, 1, 1, 1, 2, 2, 2, 5])

    def of(estimator, **options):
        return group_advantage(rewards, offsets, estimator=estimator, backend=backend, **options).tolist()

    assert of("opo", lengths=lengths)[:2] == pytest.approx([1.5, -0.5])  # the mean by length is (1 - 3) / 4
    assert of("opo", lengths=torch.ones(9)) == pytest.approx(of("dr_grpo"))
    assert of("gpg") == of("dr_grpo")  # no reward is 0
    # The first group's others have means 1, -1 and 1 and no variance within, so its own other reward stands: rloo.
    assert of("james_stein")[:2] == pytest.approx([2.0, -2.0])
    # The second's: means 0, -1 and 1, variances over k of 1 and 0: v = 1/2, s = 2/3, shrunk from 1 by 3/7 to 0.
    assert of("james_stein")[2:5] == pytest.approx([3 / 7] * 3)
    assert of("james_stein")[8] == pytest.approx(1.0)  # alone: the mean of the other groups, 0


def test_gpg_counts_the_rewards_that_speak(backend):
    rewards, offsets = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 4])
    options = dict(estimator="gpg", reward_range=(0.0, 1.0), backend=backend)
    assert group_advantage(rewards, offsets, **options).tolist() == [3.0, -1.0, -1.0, -1.0]
    assert not group_advantage(rewards * 0, offsets, **options).any()


def test_calibrated_advantages_are_those_of_shrinkage(backend):
    data = ragged_groups(60, 0, 9, seed=2)
    for own, estimator in ((False, "v05_calibrated"), (True, "v05_calibrated_loo")):
        result = shrinkage(*data, fusion="calibrated", leave_one_out=own, advantages=True, backend=backend)
        torch.testing.assert_close(advantages(data, estimator, backend), result.advantages, rtol=0, atol=1e-6)


def test_calibrated_advantages_go_on_from_a_state(backend):
    data, state = ragged_groups(60, 0, 9, seed=2), torch.tensor([90.0, 1, 1, 1, 1, 1, 1])
    for own, estimator in ((False, "v05_calibrated"), (True, "v05_calibrated_loo")):
        options = dict(fusion="calibrated", leave_one_out=own, advantages=True, state=state, backend=backend)
        result = shrinkage(*data, **options).advantages
        found = advantages(data, estimator, backend, state=state)
        torch.testing.assert_close(found, result, rtol=0, atol=1e-6)
        assert (found - advantages(data, estimator, backend)).abs().max() > 0.01
        scaled = advantages(data, estimator, backend, state=state, scale="batch")
        torch.testing.assert_close(scaled, result / (data.rewards.std() + 1e-6))


@pytest.mark.parametrize(("estimator", "scale"), list(combinations()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cpu_is_as_exact_as_torch(estimator, scale, dtype):
    data = ragged_groups(700, 0, 12, seed=7, values=(-1.0, -0.5, 1.0), dtype=dtype)
    wide = data._replace(rewards=data.rewards.double(), prior=data.prior.double())
    exact = advantages(wide, estimator, "reference", scale=scale)
    same = advantages(data, estimator, "reference", scale=scale)
    with poisoned_outputs():
        result = advantages(data, estimator, "cpu", scale=scale)
    assert_as_exact_as(result, same, exact)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_are_exactly_zero(backend, value, dtype):
    rewards, offsets = torch.full((13,), value, dtype=dtype), torch.tensor([0, 3, 6, 13])
    for estimator in ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus"):
        assert not group_advantage(rewards, offsets, estimator=estimator, backend=backend).any(), estimator


def test_a_fused_advantage_is_never_divided_by_a_std_of_zero(backend):
    """All failed where success was expected: GRPO throws the group away, V0.5 learns from it, and nothing blows up."""
    rewards, offsets, prior = torch.full((4,), -1.0), torch.tensor([0, 4]), torch.tensor([0.6])
    plain = group_advantage(rewards, offsets, prior=prior, backend=backend)
    assert plain.tolist() == pytest.approx([-0.15625] * 4)
    for scale in ("group", "batch"):
        assert torch.equal(group_advantage(rewards, offsets, prior=prior, scale=scale, backend=backend), plain)


def test_singletons_and_empty_groups(backend):
    rewards, offsets = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1, 1, 3])
    for estimator in ("grpo", "dr_grpo", "rloo"):
        result = group_advantage(rewards, offsets, estimator=estimator, backend=backend)
        assert result[0] == 0
        assert torch.isfinite(result).all()
    alone = group_advantage(rewards[:1], torch.tensor([0, 1]), estimator="reinforce_plus_plus", backend=backend)
    assert alone.tolist() == [0.0]
    prior = torch.tensor([0.25, 0.0, 0.5])
    loo = group_advantage(rewards, offsets, estimator="v05_loo", prior=prior, backend=backend)
    assert loo[0].item() == 0.75  # one rollout: the prior alone


def test_leave_one_out_matches_shrinkage(backend):
    data = ragged_groups(80, 0, 9, seed=1)
    expected = data.rewards - shrinkage(*data, leave_one_out=True).rollout_baseline
    torch.testing.assert_close(advantages(data, "v05_loo", backend), expected)


def test_lengths_weigh_the_batch(backend):
    rewards, offsets, lengths = torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 3]), torch.tensor([1, 2, 3])
    tokens = torch.tensor([1.0, -1, -1, 1, 1, 1])
    result = group_advantage(
        rewards, offsets, estimator="reinforce_plus_plus", lengths=lengths, eps=0.0, backend=backend
    )
    expected = (tokens - tokens.mean()) / tokens.std()
    torch.testing.assert_close(result, expected[[0, 1, 3]])


def test_lengths_count_where_an_estimator_is_defined_over_tokens_and_nowhere_else(backend):
    data = ragged_groups(30, 1, 9, seed=3)
    lengths = torch.arange(len(data.rewards)) % 7 + 1
    for estimator, defined in ESTIMATORS.items():
        scale = "batch" if defined.scale.name == "NONE" else "none"
        of = [
            advantages(data, estimator, backend, scale=scale, lengths=by) for by in (lengths, torch.ones(len(lengths)))
        ]
        assert torch.equal(*of) is (estimator not in ("opo", "reinforce_plus_plus")), estimator


def test_the_scale_of_opo_counts_rollouts(backend):
    data = ragged_groups(30, 1, 9, seed=3)
    lengths = torch.arange(len(data.rewards)) % 7
    scaled = advantages(data, "opo", backend, scale="batch", lengths=lengths)
    plain = advantages(data, "opo", backend, lengths=lengths)
    torch.testing.assert_close(scaled, plain / (data.rewards.std() + 1e-6))


def test_same_bits_from_any_number_of_threads():
    data = ragged_groups(60_000, 1, 10, seed=9, values=(-1.0, 0.2, 1.0))
    for estimator, scale in (("reinforce_plus_plus", "none"), ("v05", "batch"), ("grpo", "none")):
        two = advantages(data, estimator, scale=scale)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(advantages(data, estimator, scale=scale), two)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(estimator="magic"), "estimator is 'magic'; allowed: 'v05'"),
        (dict(scale="loud"), "scale is 'loud'; allowed: 'none'"),
        (dict(estimator="grpo", scale="batch"), "grpo is defined with 'group'"),
        (dict(estimator="v05"), "prior is missing"),
        (dict(estimator="grpo", prior=torch.zeros(2)), "prior is given; estimator 'grpo' needs none"),
        (dict(estimator="grpo", eps=-1), "eps is -1"),
        (dict(estimator="grpo", lengths=torch.ones(3)), r"lengths has shape \[3\]; allowed: \[4\]"),
        (dict(estimator="opo"), "lengths is missing; estimator 'opo' needs the tokens of each rollout"),
        (dict(estimator="grpo", state=torch.ones(7)), "state is given; estimator 'grpo' has none"),
        (dict(estimator="opo", lengths=torch.ones(4, device="meta")), "lengths is on meta; allowed: cpu"),
        (dict(estimator="opo", lengths=torch.tensor([1.0, 2, math.nan, 1])), r"lengths\[2\] is nan; allowed: 0 to"),
        (dict(estimator="opo", lengths=torch.tensor([1, -2, 1, 1])), r"lengths\[1\] is -2; allowed: 0 to"),
        (dict(estimator="opo", lengths=torch.tensor([1, 2, math.inf, 1])), r"lengths\[2\] is inf; allowed: 0 to"),
        (dict(prior=torch.tensor([0.0, 2.0])), r"prior\[1\] is 2"),
        (dict(estimator="rloo", reward_range=(0, 1)), r"rewards\[2\] is -1 \(group 1\); allowed: 0 to 1|to 1"),
    ],
)
def test_bad_input_is_named(backend, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.tensor([1.0, 1, -1, -1]), torch.tensor([0, 2, 4]), backend=backend, **options)


def test_every_name_resolves():
    assert {resolve(estimator, scale).scale.name.lower() for estimator, scale in combinations()} == set(SCALES)


@given(
    lengths=st.lists(st.integers(0, 5), max_size=6),
    name=st.sampled_from(list(combinations())),
    seed=st.integers(0, 999),
)
def test_finite_and_equal_to_the_reference(lengths, name, seed):
    rng = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    rewards = torch.randint(0, 3, (int(offsets[-1]),), generator=rng).double() - 1
    prior = torch.rand(len(lengths), generator=rng, dtype=torch.float64) * 2 - 1
    estimator, scale = name
    options = dict(estimator=estimator, scale=scale, prior=prior if ESTIMATORS[estimator].needs_prior else None)
    options |= dict(lengths=torch.randint(0, 9, rewards.shape, generator=rng))
    result = group_advantage(rewards, offsets, **options)
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, group_advantage(rewards, offsets, backend="reference", **options))


def test_opcheck_and_compile():
    data = ragged_groups(12, 0, 6)
    for prior, baseline, scale in ((data.prior, 0, 3), (data.prior, 1, 0), (None, 2, 1), (None, 4, 2)):
        arguments = (data.rewards, data.offsets, prior, None, baseline, scale, -1.0, 1.0, 1e-6, "cpu")
        torch.library.opcheck(torch.ops.v05.group_advantage.default, arguments)

    def step(rewards, offsets, prior):
        return group_advantage(rewards, offsets, prior=prior, scale="baseline") + 1

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*data), step(*data))

    def shrunk(rewards, offsets):
        return group_advantage(rewards, offsets, estimator="james_stein")

    torch.testing.assert_close(torch.compile(shrunk, fullgraph=True)(*data[:2]), shrunk(*data[:2]))
