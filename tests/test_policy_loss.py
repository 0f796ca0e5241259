"""policy_loss: hand-computed numbers, every variant against the oracle, and which tokens a covariance selects."""

import itertools
import math

import pytest
import torch
from policy_losses import cast, one_token, run

from v05.kernels import select_by_covariance
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, METRICS, SURROGATES
from v05.testing import RaggedTokens, assert_as_exact_as, poisoned_outputs, ragged_tokens

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize(
    ("ratio", "advantage", "options", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, dict(), -2.2, -2.2, ""),
        (1.3, 2.0, dict(), -2.4, 0.0, "clipped_high"),
        (1.25, 2.0, dict(clip_high=0.28), -2.5, -2.5, ""),
        (1.3, -2.0, dict(), 2.6, 2.6, ""),
        (0.5, -2.0, dict(), 1.6, 0.0, "clipped_low"),
        (0.5, 2.0, dict(), -1.0, -1.0, ""),
        (5.0, -2.0, dict(dual_clip=3.0), 6.0, 0.0, "dual_clipped"),
        (5.0, -2.0, dict(), 10.0, 10.0, ""),
        (5.0, 0.0, dict(dual_clip=3.0), 0.0, 0.0, ""),
        (1.3, 2.0, dict(surrogate="cispo"), 2.4, -2.4, "clipped_high"),
        (0.5, -2.0, dict(surrogate="cispo"), -1.6, 1.6, "clipped_low"),
        (1.1, 2.0, dict(surrogate="cispo"), 2.2, -2.2, ""),
        (1.0, 2.0, dict(surrogate="sapo"), -4.0, -2.0, ""),
        (1.0, -2.0, dict(surrogate="sapo", sapo_tau_neg=2.0), 2.0, 2.0, ""),
        (3.0, 2.0, dict(surrogate="gpg"), 2.0, -2.0, ""),
        (3.0, 2.0, dict(surrogate="reinforce"), 2.0, -2.0, ""),
        (2.0, 1.0, dict(surrogate="kl_cov", covariance_selected=torch.tensor([False])), -2.0, -2.0, ""),
        (2.0, 1.0, dict(surrogate="kl_cov", covariance_selected=torch.tensor([True])), math.log(2) - 2, -1.0, ""),
        (1.1, 1.0, dict(surrogate="clip_cov", covariance_selected=torch.tensor([True])), 0.0, 0.0, ""),
        (1.3, 1.0, dict(surrogate="clip_cov", covariance_selected=torch.tensor([False])), -1.2, 0.0, "clipped_high"),
    ],
)
def test_surrogates_by_hand(backend, ratio, advantage, options, loss, gradient, clipped):
    result = one_token(ratio, advantage, backend, **options)
    assert result[:2] == pytest.approx((loss, gradient), abs=1e-12)
    counts = {name: result[2][name] for name in ("clipped_low", "clipped_high", "dual_clipped")}
    assert counts == {name: float(name == clipped) for name in counts}
    assert result[2]["ratio_sum"] == pytest.approx(ratio)
    assert result[2]["log_ratio_sum"] == pytest.approx(math.log(ratio))


E3 = math.exp(-0.5) + 0.5 - 1


@pytest.mark.parametrize(
    ("kl", "value", "slope"),
    [
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", E3, 1 - math.exp(-0.5)),
        ("k1+", 0.5, 0.5),
        ("k3+", E3, 0.5),
    ],
)
def test_kl_by_hand(backend, kl, value, slope):
    loss, gradient, metrics = one_token(1.0, 0.0, backend, kl=kl, kl_coef=2.0)
    assert (loss, gradient, metrics["kl_sum"]) == pytest.approx((2 * value, 2 * slope, value))


@pytest.mark.parametrize(
    ("correction", "cap", "floor", "weight"),
    [
        ("token_truncate", 2.0, None, math.exp(0.25)),
        ("token_truncate", 1.2, None, 1.2),
        ("token_mask", 2.0, None, math.exp(0.25)),
        ("token_mask", 1.2, None, 0.0),
        ("token_mask", 2.0, 1.5, 0.0),
        ("sequence_truncate", 1.2, None, 1.2),
        ("sequence_mask", 1.2, None, 0.0),
    ],
)
def test_correction_by_hand(backend, correction, cap, floor, weight):
    """The KL is not weighed."""
    options = dict(sampler_correction=correction, sampler_cap=cap, sampler_floor=floor, kl="k1", kl_coef=1.0)
    loss, gradient, metrics = one_token(1.0, 2.0, backend, **options)
    assert (loss, gradient) == pytest.approx((-2 * weight + 0.5, -2 * weight + 1))
    assert metrics["sampler_weight_sum"] == pytest.approx(weight)
    assert metrics["sampler_masked"] == float(weight == 0)


def test_a_sequence_corrects_by_the_product_of_its_tokens(backend):
    zero = torch.zeros(4, dtype=torch.float64)
    data = RaggedTokens(zero, zero, zero, zero, torch.ones(2, dtype=torch.float64), zero + 1, torch.tensor([0, 3, 4]))
    data = data._replace(
        sampler_logprobs=torch.tensor([-0.2, 0.1, -0.1, 3.0]), weights=torch.tensor([1.0, 1.0, 0.0, 1.0])
    )
    loss, _, metrics = run(data, backend, sampler_correction="sequence_truncate")
    assert -loss.item() == pytest.approx(2 * math.exp(0.1) + math.exp(-3.0))
    assert metrics["sampler_weight_sum"].item() == pytest.approx(-loss.item())


def test_sequence_level_takes_the_mean_over_unmasked_tokens(backend):
    """Its gradient reaches every token of the sequence equally, whatever the weights and per-token advantages."""
    x = torch.tensor([0.1, 0.2, 9.0, 0.3], dtype=torch.float64)
    data = RaggedTokens(x - 1, x * 0 - 1, x, x, torch.tensor([1.0, 2, 5, -1]), torch.tensor([0.5, 1, 0, 2]), None)
    data = data._replace(sequence_offsets=torch.tensor([0, 4]))
    loss, gradient, metrics = run(data, backend, level="sequence", clip_high=0.5)
    ratio, weighted = math.exp(0.2), 0.5 * 1 + 1 * 2 - 2 * 1
    assert loss.item() == pytest.approx(-ratio * weighted)
    assert gradient.tolist() == pytest.approx([-ratio * weighted / 3] * 2 + [0, -ratio * weighted / 3])
    assert metrics["ratio_sum"].item() == pytest.approx(3 * ratio)


@pytest.mark.parametrize(("surrogate", "level"), list(itertools.product(SURROGATES, LEVELS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_variant_is_as_exact_as_torch(surrogate, level, dtype):
    data = ragged_tokens(40, 0, 64, seed=3, dtype=dtype)
    selected = torch.rand(data.logprobs.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    own = dict(covariance_selected=selected) if surrogate in ("clip_cov", "kl_cov") else {}
    own |= dict(dual_clip=1.3) if surrogate == "ppo" else {}
    for kl, correction in itertools.product(KLS, CORRECTIONS):
        options = dict(surrogate=surrogate, level=level, kl=kl, sampler_correction=correction, sampler_cap=1.5, **own)
        exact = run(cast(data, torch.float64), "reference", **options)
        same = run(data, "reference", **options)
        with poisoned_outputs():
            result = run(data, "cpu", **options)
        for got, torchs, true in zip(result[:2], same[:2], exact[:2], strict=True):
            assert_as_exact_as(got, torchs, true)
        for name in METRICS:
            assert_as_exact_as(
                result[2][name], same[2][name], exact[2][name], 1e-12 if dtype == torch.float64 else 1e-6
            )


@pytest.mark.parametrize(("surrogate", "level"), list(itertools.product(SURROGATES, LEVELS)))
@pytest.mark.parametrize("correction", ["none", "sequence_truncate", "sequence_mask"])
def test_advantages_per_token_equal_those_per_sequence(backend, surrogate, level, correction):
    """Where tokens differ by their weight alone, a sequence's loss may come from its sums: not if advantages do too."""
    for sequences, longest in ((30, 9), (5, 1700)):
        data = ragged_tokens(sequences, 0, longest, seed=4, dtype=torch.float64)
        spread = data._replace(advantages=data.advantages.repeat_interleave(data.sequence_offsets.diff()))
        options = dict(surrogate=surrogate, level=level, sampler_correction=correction)
        if "cov" in surrogate:
            options["covariance_selected"] = torch.arange(len(data.logprobs)) % 3 == 0
        torch.testing.assert_close(run(spread, backend, **options), run(data, backend, **options))


def test_metrics_count(backend):
    data = ragged_tokens(50, 0, 3, seed=10)
    loss, _, metrics = run(data, backend)
    ids = torch.repeat_interleave(torch.arange(50), data.sequence_offsets.diff())
    kept = data.weights != 0
    assert tuple(metrics) == METRICS
    assert metrics["tokens"].item() == kept.sum().item() == metrics["sampler_weight_sum"].item()
    assert metrics["sequences"].item() == ids[kept].unique().numel()
    assert all(value.shape == () and value.dtype == torch.float32 for value in [loss, *metrics.values()])


def test_covariance_selection():
    logprobs = torch.tensor([-1.0, -5.0, -1.0, -5.0, -3.0, math.nan])
    advantages = torch.tensor([2.0, -2.0, -2.0, 1.9, 0.1, 9.0])
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])
    rest = dict(sequence_offsets=torch.tensor([0, 2, 6]))
    chosen = select_by_covariance(logprobs, logprobs, advantages, weights, surrogate="kl_cov", fraction=0.4, **rest)
    assert chosen.tolist() == [True, True, False, False, False, False]
    unheard = torch.where(logprobs.isnan(), -math.inf, logprobs)
    heard = select_by_covariance(unheard, unheard, advantages, weights + 1, surrogate="kl_cov", fraction=0.4, **rest)
    assert torch.equal(heard, chosen)
    few = select_by_covariance(logprobs, logprobs, advantages, weights, surrogate="kl_cov", **rest)
    assert few.sum() == 1
    above, below = (torch.zeros(6).index_fill(0, torch.tensor([place]), 0.5) for place in (0, 1))
    for old, bounds, expected in (
        (logprobs, (1.0, 5.0), [True, True]),
        (logprobs - above, (1.0, 5.0), [False, True]),  # the first token's ratio is clipped anyhow
        (logprobs + below, (1.0, 5.0), [True, False]),  # the second's
        (logprobs, (1.0, 3.9), [False, False]),  # both covariances are 4
        (logprobs, (4.1, 5.0), [False, False]),
    ):
        options = dict(surrogate="clip_cov", fraction=1.0, bounds=bounds, **rest)
        chosen = select_by_covariance(logprobs, old, advantages, weights, **options)
        assert chosen.tolist() == [*expected, False, False, False, False]
    drawn = [
        int(
            select_by_covariance(
                logprobs,
                logprobs,
                advantages,
                weights,
                surrogate="clip_cov",
                generator=torch.Generator().manual_seed(seed),
                **rest,
            ).nonzero()
        )
        for seed in [*range(20)] * 2
    ]
    assert drawn[:20] == drawn[20:]
    assert set(drawn) == {0, 1}
