"""policy_loss: hand-computed numbers, every variant against the oracle with gradients, masks, splits, and bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v05.kernels import policy_loss, select_by_covariance
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, METRICS, SURROGATES, make_kinds, make_numbers
from v05.testing import RaggedTokens, assert_as_exact_as, offsets_of, poisoned_outputs, ragged_tokens

BACKENDS = ["reference", "cpu"]
ARRAYS = ["logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "weights"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def cast(data, dtype):
    return RaggedTokens(*(value.to(dtype) if value.is_floating_point() else value for value in data))


def options_for(data, kl="none", sampler_correction="none", **options):
    """The options, with the tensors they need."""
    options |= dict(kl=kl, sampler_correction=sampler_correction)
    if kl != "none":
        options.setdefault("kl_coef", 0.1)
        options["ref_logprobs"] = data.ref_logprobs
    if sampler_correction != "none":
        options["sampler_logprobs"] = data.sampler_logprobs
    return options


def run(data, backend=None, **options):
    """The loss, its gradient and the metrics, as tensors."""
    logprobs = data.logprobs.clone().requires_grad_()
    result = policy_loss(
        logprobs,
        data.old_logprobs,
        data.advantages,
        data.weights,
        sequence_offsets=data.sequence_offsets,
        backend=backend,
        **options_for(data, **options),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert not any(value.requires_grad for value in result.metrics.values())
    return result.loss.detach(), gradient, result.metrics


def one_token(ratio, advantage, backend, **options):
    """Loss, gradient and metrics of a single token with a log-prob of -1."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64)
    data = RaggedTokens(
        logprobs,
        logprobs - math.log(ratio),
        torch.full_like(logprobs, -1.5),
        torch.full_like(logprobs, -1.25),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones_like(logprobs),
        torch.tensor([0, 1]),
    )
    loss, gradient, metrics = run(data, backend, **options)
    return loss.item(), gradient.item(), {name: value.item() for name, value in metrics.items()}


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


@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck_of_the_reference(level):
    data = ragged_tokens(5, 0, 5, seed=6, dtype=torch.float64)
    for surrogate, kl in zip(("ppo", "sapo", "gpg", "kl_cov"), ("none", "k1", "k2", "k3"), strict=True):
        own = dict(covariance_selected=data.logprobs < -0.5) if surrogate == "kl_cov" else {}
        options = options_for(data, kl, "token_truncate", surrogate=surrogate, level=level, **own)

        def loss(logprobs, options=options):
            rest = (data.old_logprobs, data.advantages, data.weights)
            return policy_loss(
                logprobs, *rest, sequence_offsets=data.sequence_offsets, backend="reference", **options
            ).loss

        assert torch.autograd.gradcheck(loss, data.logprobs.clone().requires_grad_())


def test_what_a_masked_token_holds_does_not_matter(backend):
    data = ragged_tokens(20, 1, 30, seed=8)
    masked = data.weights == 0
    advantages = data.advantages.repeat_interleave(data.sequence_offsets.diff())
    per_token = data._replace(advantages=advantages)
    for value, level in itertools.product((math.nan, math.inf, -math.inf), LEVELS):
        changed = {
            name: torch.where(masked, value, getattr(data, name))
            for name in [*ARRAYS[:4], "advantages"]
            if name != "advantages"
        }
        changed["advantages"] = torch.where(masked, value, advantages)
        for surrogate, kl, correction in zip(
            [*SURROGATES], itertools.cycle([*KLS][1:]), itertools.cycle([*CORRECTIONS][1:]), strict=False
        ):
            own = dict(covariance_selected=torch.ones_like(masked)) if "cov" in surrogate else {}
            options = dict(surrogate=surrogate, level=level, kl=kl, sampler_correction=correction, **own)
            spoiled, clean = (run(d, backend, **options) for d in (data._replace(**changed), per_token))
            torch.testing.assert_close(spoiled, clean, rtol=0, atol=0)
            assert not spoiled[1][masked].any()


def test_minus_infinity_where_the_result_is_finite(backend):
    inf = math.inf
    logprobs = torch.tensor([-inf, -inf, -1.0, -1.0], dtype=torch.float64)
    old = torch.tensor([-inf, -2.0, -inf, -1.0], dtype=torch.float64)
    data = RaggedTokens(logprobs, old, old, old, torch.ones(1), torch.ones(4), torch.tensor([0, 4]))
    for level, correction in itertools.product(LEVELS, CORRECTIONS):
        for surrogate, kl in itertools.product(("ppo", "sapo", "kl_cov"), ("none", "k3")):
            own = dict(covariance_selected=torch.ones(4, dtype=torch.bool)) if surrogate == "kl_cov" else {}
            options = dict(surrogate=surrogate, level=level, kl=kl, sampler_correction=correction, **own)
            loss, gradient, metrics = run(data, backend, **options)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()
            assert not gradient[:3].any(), "beyond the bound there is no gradient"
            assert all(torch.isfinite(value) for value in metrics.values())
    assert run(data, backend)[2]["ratio_sum"].item() == pytest.approx(2 + math.exp(-20) + math.exp(20))


def test_a_ratio_cannot_overflow(backend):
    data = ragged_tokens(4, 3, 9, seed=5)._replace(sampler_logprobs=None)
    data = data._replace(logprobs=data.logprobs * 0, old_logprobs=data.old_logprobs * 0 - 1e30)
    data = data._replace(sampler_logprobs=data.old_logprobs * 3, ref_logprobs=data.old_logprobs * -0.0 + 500)
    for surrogate, level, correction in itertools.product(("ppo", "sapo", "cispo"), LEVELS, CORRECTIONS):
        result = run(data, backend, surrogate=surrogate, level=level, kl="k3", sampler_correction=correction)
        assert torch.isfinite(result[0])
        assert torch.isfinite(result[1]).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", ["none", "token_mask", "sequence_mask"])
def test_where_nothing_speaks_the_loss_is_zero(backend, level, correction):
    empty = ragged_tokens(3, 0, 0)
    masked = ragged_tokens(3, 0, 5)
    masked = masked._replace(weights=masked.weights * 0, advantages=masked.advantages * math.nan)
    none = RaggedTokens(*[torch.empty(0)] * 6, torch.tensor([0]))
    for data in (empty, masked, none):
        for surrogate in SURROGATES:
            loss, gradient, metrics = run(
                data, backend, surrogate=surrogate, level=level, kl="k3", sampler_correction=correction
            )
            assert loss.item() == 0
            assert not gradient.any()
            assert all(value.item() == 0 for value in metrics.values())


def test_metrics_count(backend):
    data = ragged_tokens(50, 0, 3, seed=10)
    loss, _, metrics = run(data, backend)
    ids = torch.repeat_interleave(torch.arange(50), data.sequence_offsets.diff())
    kept = data.weights != 0
    assert tuple(metrics) == METRICS
    assert metrics["tokens"].item() == kept.sum().item() == metrics["sampler_weight_sum"].item()
    assert metrics["sequences"].item() == ids[kept].unique().numel()
    assert all(value.shape == () and value.dtype == torch.float32 for value in [loss, *metrics.values()])


@pytest.mark.parametrize(("surrogate", "level"), list(itertools.product(SURROGATES, LEVELS)))
def test_a_split_batch_has_the_same_gradient(backend, surrogate, level):
    data = ragged_tokens(24, 0, 30, seed=9)
    options = dict(surrogate=surrogate, level=level, kl="k3", sampler_correction="sequence_mask")
    selected = None
    if "cov" in surrogate:
        selected = select_by_covariance(
            data.logprobs,
            data.old_logprobs,
            data.advantages,
            data.weights,
            sequence_offsets=data.sequence_offsets,
            surrogate=surrogate,
            fraction=0.05,
            bounds=(0.1, 5.0),
            generator=torch.Generator().manual_seed(0),
        )
        assert selected.any()
    whole = run(data, backend, covariance_selected=selected, **options)
    for ways in (2, 4):
        losses, gradients, sums = [], [], []
        for part in range(ways):
            first, last = 24 * part // ways, 24 * (part + 1) // ways
            offsets = data.sequence_offsets[first : last + 1]
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            piece = [value[tokens] for value in data[:4]] + [data.advantages[first:last], data.weights[tokens]]
            chosen = None if selected is None else selected[tokens]
            loss, gradient, metrics = run(
                RaggedTokens(*piece, offsets - offsets[0]), backend, covariance_selected=chosen, **options
            )
            losses.append(loss), gradients.append(gradient), sums.append(torch.stack(list(metrics.values())))
        assert sum(losses).item() == pytest.approx(whole[0].item(), rel=1e-6, abs=1e-7)
        torch.testing.assert_close(torch.cat(gradients), whole[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(sum(sums), torch.stack(list(whole[2].values())), rtol=1e-6, atol=1e-5)


def test_same_bits_from_run_to_run_and_from_any_number_of_threads():
    data = ragged_tokens(900, 0, 90, seed=12)
    for level, correction, surrogate in itertools.product(LEVELS, ("none", "sequence_truncate"), ("ppo", "sapo")):
        options = dict(level=level, sampler_correction=correction, surrogate=surrogate, kl="k3")
        first = run(data, **options)
        for _ in range(10):
            torch.testing.assert_close(run(data, **options), first, rtol=0, atol=0)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            torch.testing.assert_close(run(data, **options), first, rtol=0, atol=0)
        finally:
            torch.set_num_threads(threads)


def shuffled(data, order):
    """The sequences in another order, and where each token of the result came from."""
    pieces = [torch.arange(int(data.sequence_offsets[i]), int(data.sequence_offsets[i + 1])) for i in order]
    source = torch.cat(pieces)
    offsets = offsets_of(data.sequence_offsets.diff()[order])
    tokens = {name: getattr(data, name)[source] for name in ARRAYS}
    return RaggedTokens(**tokens, advantages=data.advantages[order], sequence_offsets=offsets), source


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_has_the_same_bits_whatever_else_is_in_the_batch(level):
    data = ragged_tokens(60, 0, 700, seed=13)
    for surrogate, correction in (("ppo", "none"), ("sapo", "sequence_truncate"), ("cispo", "token_mask")):
        options = dict(level=level, surrogate=surrogate, kl="k3", sampler_correction=correction)
        gradient = run(data, **options)[1]
        for seed in range(20):
            order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[: 60 - seed]
            other, source = shuffled(data, order)
            assert torch.equal(run(other, **options)[1], gradient[source])


def test_upstream_gradients_scale_and_graphs_are_freed():
    data = ragged_tokens(5, 1, 9, seed=2)
    logprobs = data.logprobs.clone().requires_grad_()
    rest = (data.old_logprobs, data.advantages, data.weights)
    result = policy_loss(logprobs, *rest, sequence_offsets=data.sequence_offsets)
    (3 * result.loss).backward()
    torch.testing.assert_close(logprobs.grad, 3 * run(data)[1])
    assert policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets).loss.requires_grad is False


def test_other_dtypes_and_strides(backend):
    data = ragged_tokens(9, 1, 9, seed=2)
    expected = run(data, backend)
    wide = torch.stack([data.logprobs, torch.full_like(data.logprobs, math.nan)], 1)
    torch.testing.assert_close(run(data._replace(logprobs=wide[:, 0]), backend)[:2], expected[:2])
    mixed = data._replace(advantages=data.advantages.double(), weights=data.weights.double())
    torch.testing.assert_close(run(mixed, backend)[:2], expected[:2])
    half = data._replace(logprobs=data.logprobs.bfloat16())
    loss, gradient, _ = run(half, backend)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)


def test_a_gradient_may_be_written_into_where_the_graph_is_kept():
    ones = torch.ones(4)
    leaf = (-ones).requires_grad_()
    loss = policy_loss(leaf, -ones, ones[:1], ones, sequence_offsets=torch.tensor([0, 4])).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, leaf)
    assert second.tolist() == [-1.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [0.25, 1.0, -3.0, 0.0, math.inf, math.nan])
def test_a_stored_gradient_is_scaled_where_it_is(dtype, by):
    """But where the graph is kept, and so is what is stored; NaN and inf come out as of any other product."""
    data = ragged_tokens(5, 0, 9, dtype=dtype)
    leaf = data.logprobs.clone().requires_grad_()
    rest = (data.old_logprobs, data.advantages, data.weights)
    loss = policy_loss(leaf, *rest, sequence_offsets=data.sequence_offsets).loss
    (stored,) = loss.grad_fn.saved_tensors
    place, expected, upstream = stored.data_ptr(), stored * by, loss.new_tensor(by)
    for kept in (True, True, False):
        before = stored.clone()
        (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=kept)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
        assert (gradient.data_ptr() == place) == (not kept)
        assert not kept or torch.equal(stored, before)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_that_the_op_itself_handed_out_is_not_written_into():
    ones = torch.ones(4)
    given = ((-ones).requires_grad_(), -ones, ones[:1], ones, torch.tensor([0, 4]), None, None, None)
    numbers = [0.2, 0.2, float("inf"), 1.0, 1.05, 1.0, 0.0, 0.5, 2.0]
    loss, gradient, _ = torch.ops.v05.policy_loss(*given, [0] * 4, numbers, "cpu")
    (3 * loss).backward()
    assert given[0].grad.tolist() == [-3.0] * 4
    assert gradient.tolist() == [-1.0] * 4


def test_covariance_selection():
    logprobs = torch.tensor([-1.0, -5.0, -1.0, -5.0, -3.0, math.nan])
    advantages = torch.tensor([2.0, -2.0, -2.0, 1.9, 0.1, 9.0])
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])
    rest = dict(sequence_offsets=torch.tensor([0, 2, 6]))
    chosen = select_by_covariance(logprobs, logprobs, advantages, weights, surrogate="kl_cov", fraction=0.4, **rest)
    assert chosen.tolist() == [True, True, False, False, False, False]
    few = select_by_covariance(logprobs, logprobs, advantages, weights, surrogate="kl_cov", **rest)
    assert few.sum() == 1
    old = logprobs - torch.tensor([0.5, 0, 0, 0, 0, 0])  # the first token's ratio is clipped anyhow
    both = [
        select_by_covariance(logprobs, o, advantages, weights, surrogate="clip_cov", fraction=1.0, **rest)
        for o in (logprobs, old)
    ]
    assert both[0].tolist() == [True, True, False, False, False, False]
    assert both[1].tolist() == [False, True, False, False, False, False]
    drawn = {
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
        for seed in range(20)
    }
    assert drawn == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logprobs=[0.0, 0, 0, math.nan]), r"logprobs\[3\] is nan \(sequence 1\); allowed: below inf"),
        (dict(logprobs=[0.0, math.inf, 0, 0]), r"logprobs\[1\] is inf \(sequence 0\)"),
        (dict(old_logprobs=[0.0, 0, math.nan, 0]), r"old_logprobs\[2\] is nan \(sequence 1\)"),
        (
            dict(logprobs=[-math.inf, 0, 0, 0], surrogate="gpg"),
            r"logprobs\[0\] is -inf \(sequence 0\); allowed: finite",
        ),
        (dict(logprobs=[-math.inf, 0, 0, 0], surrogate="cispo"), r"logprobs\[0\] is -inf"),
        (dict(advantages=[0.0, math.nan]), r"advantages\[1\] is nan; allowed: finite"),
        (dict(advantages=[0.0, 0, math.inf, 0]), r"advantages\[2\] is inf \(sequence 1\)"),
        (dict(advantages=[0.0, 0, 0]), "advantages has 3 elements; allowed: 2, one per sequence, or 4, one per token"),
        (dict(weights=[1.0, 1, math.nan, 1]), r"weights\[2\] is nan \(sequence 1\); allowed: finite"),
        (dict(weights=[1.0, 1]), "weights has 2 elements; allowed: 4"),
        (dict(offsets=[0, 2, 3]), r"sequence_offsets\[2\] is 3; allowed: 4"),
        (dict(offsets=[0, 9, 4]), r"sequence_offsets\[2\] is 4; allowed: 9"),
        (dict(offsets=[0]), "sequence_offsets has 1 element; allowed: at least 2, for there are 4 elements"),
        (dict(kl="k3"), "ref_logprobs is missing; kl 'k3' needs it"),
        (dict(ref_logprobs=torch.zeros(4)), "ref_logprobs is given; kl 'none' needs none"),
        (dict(kl="k3", ref_logprobs=torch.tensor([0, math.nan, 0, 0])), r"ref_logprobs\[1\] is nan"),
        (dict(kl="k2", ref_logprobs=torch.tensor([0, -math.inf, 0, 0])), r"ref_logprobs\[1\] is -inf.*k3 alone"),
        (dict(sampler_correction="token_mask"), "sampler_logprobs is missing"),
        (dict(sampler_logprobs=torch.zeros(4)), "sampler_logprobs is given"),
        (
            dict(sampler_correction="token_mask", sampler_logprobs=torch.tensor([0, 0, math.nan, 0])),
            r"sampler_logprobs\[2\] is nan \(sequence 1\)",
        ),
        (
            dict(sampler_correction="sequence_mask", sampler_logprobs=torch.tensor([0, 0, math.nan, 0])),
            r"sampler_logprobs\[2\] is nan \(sequence 1\)",
        ),
        (dict(surrogate="magic"), "surrogate is 'magic'; allowed: 'ppo', 'cispo'"),
        (dict(level="batch"), "level is 'batch'; allowed: 'token', 'sequence'"),
        (dict(kl="k4"), "kl is 'k4'; allowed: 'none', 'k1', 'k2', 'k3', 'k1\\+', 'k3\\+'"),
        (dict(sampler_correction="some"), "sampler_correction is 'some'; allowed: 'none', 'token_truncate'"),
        (dict(clip_low=-0.1), "clip_low is -0.1"),
        (dict(clip_high=math.nan), "clip_high is nan"),
        (dict(dual_clip=1.0), "dual_clip is 1.0"),
        (dict(dual_clip=3.0, surrogate="sapo"), "dual_clip is 3.0; allowed: None"),
        (dict(sampler_cap=0.0), "sampler_cap is 0.0"),
        (dict(sampler_floor=3.0), "sampler_floor is 3.0; allowed: 0 to sampler_cap"),
        (dict(sapo_tau_pos=0.0), "sapo_tau_pos is 0.0"),
        (dict(kl_coef=math.inf), "kl_coef is inf"),
        (dict(covariance_selected=torch.zeros(4, dtype=torch.bool)), "covariance_selected is given; surrogate 'ppo'"),
        (dict(surrogate="kl_cov", covariance_selected=torch.zeros(4)), "covariance_selected is torch.float32"),
        (dict(backend="tpu"), "backend is 'tpu'"),
    ],
)
def test_bad_input_is_named(backend, change, message):
    given = dict(logprobs=[-1.0] * 4, old_logprobs=[-1.0] * 4, advantages=[1.0, 1.0], weights=[1.0] * 4)
    arguments = given | dict(offsets=[0, 2, 4], backend=backend) | change
    tensors = [torch.tensor(arguments.pop(name)) for name in given]
    offsets = torch.tensor(arguments.pop("offsets"))
    with pytest.raises(ValueError, match=message):
        policy_loss(*tensors, sequence_offsets=offsets, **arguments)


def test_wrong_dtypes_and_devices():
    data = ragged_tokens(3, 1, 3)
    rest = (data.old_logprobs, data.advantages, data.weights)
    with pytest.raises(TypeError, match=r"logprobs is torch.int64"):
        policy_loss(data.logprobs.long(), *rest, sequence_offsets=data.sequence_offsets)
    with pytest.raises(TypeError, match=r"sequence_offsets is torch.int32"):
        policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets.int())
    with pytest.raises(ValueError, match="old_logprobs is on meta"):
        policy_loss(data.logprobs, rest[0].to("meta"), *rest[1:], sequence_offsets=data.sequence_offsets)
    away = dict(surrogate="kl_cov", covariance_selected=torch.empty(data.logprobs.shape, dtype=bool, device="meta"))
    with pytest.raises(ValueError, match="covariance_selected is on meta; allowed: cpu"):
        policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets, **away)
    with pytest.raises(RuntimeError, match="'triton' cannot run policy_loss here"):
        policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets, backend="triton")


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6),
    surrogate=st.sampled_from([*SURROGATES]),
    level=st.sampled_from(LEVELS),
    kl=st.sampled_from([*KLS]),
    correction=st.sampled_from([*CORRECTIONS]),
    corrupt=st.sampled_from(["none", "none", "masked", *ARRAYS, "advantages", "first", "last"]),
    value=st.sampled_from([math.nan, math.inf]),
    seed=st.integers(0, 2**20),
)
def test_malformed_or_right(lengths, surrogate, level, kl, correction, corrupt, value, seed):
    """Whatever comes in, a clear error or the right, finite answer comes out."""
    rng = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    tokens = int(offsets[-1])
    arrays = [torch.randn(size, generator=rng) for size in [tokens] * 4 + [len(lengths), tokens]]
    data = RaggedTokens(*arrays, offsets)
    own = dict(covariance_selected=torch.rand(tokens, generator=rng) < 0.5) if "cov" in surrogate else {}
    options = dict(surrogate=surrogate, level=level, kl=kl, sampler_correction=correction, **own)
    used = {"logprobs", "old_logprobs", "weights", "advantages"}
    used |= ({"ref_logprobs"} if kl != "none" else set()) | ({"sampler_logprobs"} if correction != "none" else set())
    good = True
    if corrupt in ("first", "last"):
        data.sequence_offsets[0 if corrupt == "first" else -1] += 1
        good = False
    elif corrupt == "masked" and tokens:
        data.weights[-1] = 0
        for name in ARRAYS[:4]:
            getattr(data, name)[-1] = value
    elif corrupt in used and tokens:
        per_token = corrupt != "advantages"
        sequence = next(i for i, length in enumerate(lengths) if length)
        getattr(data, corrupt)[-1 if per_token else sequence] = value
        good = False
    if not good:
        with pytest.raises(ValueError, match="allowed"):
            run(data, **options)
        return
    loss, gradient, metrics = run(data, **options)
    exact = run(cast(data, torch.float64), "reference", **options)
    scale = max(1.0, float(exact[1].abs().max()) if tokens else 1.0)
    assert loss.item() == pytest.approx(exact[0].item(), abs=1e-5 * scale, rel=1e-5)
    torch.testing.assert_close(gradient.double(), exact[1], atol=1e-5 * scale, rtol=1e-5)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_opcheck():
    data = ragged_tokens(6, 0, 6)
    fixed = (data.old_logprobs, data.advantages, data.weights, data.sequence_offsets)
    for names in (("ppo", "token", "none", "none"), ("kl_cov", "sequence", "k3+", "sequence_mask")):
        kinds = make_kinds(*names)
        numbers = make_numbers(kinds, 0.2, 0.2, None, (1.0, 1.05), 1.0, 0.1, None, 2.0)
        full = names[0] != "ppo"
        extra = (data.ref_logprobs, data.sampler_logprobs, data.logprobs < -1) if full else (None, None, None)
        arguments = (data.logprobs.clone().requires_grad_(), *fixed, *extra, list(kinds), list(numbers), "cpu")
        torch.library.opcheck(torch.ops.v05.policy_loss.default, arguments)


def test_compiles_whole_forward_and_backward():
    def step(data, surrogate):
        logprobs = data.logprobs * 1.5
        rest = (data.old_logprobs, data.advantages, data.weights)
        options = options_for(data, "k3", surrogate=surrogate)
        result = policy_loss(logprobs, *rest, sequence_offsets=data.sequence_offsets, **options)
        return result.loss * 2, result.metrics["ratio_sum"]

    for surrogate in ("ppo", "kl_cov"):
        compiled = torch.compile(step, fullgraph=True, dynamic=True)
        for sequences in (5, 8):
            data = ragged_tokens(sequences, 1, 9, seed=sequences)
            results = []
            for function in (compiled, step):
                logprobs = data.logprobs.clone().requires_grad_()
                loss, ratio = function(data._replace(logprobs=logprobs), surrogate)
                loss.backward()
                results.append((loss.detach(), ratio, logprobs.grad))
            torch.testing.assert_close(*results)


def test_compiles_for_batches_that_shrink_to_one_sequence():
    def step(data):
        rest = (data.old_logprobs, data.advantages, data.weights)
        return policy_loss(data.logprobs, *rest, sequence_offsets=data.sequence_offsets).loss

    compiled = torch.compile(step, fullgraph=True)
    for sequences in (4, 3, 1):
        data = ragged_tokens(sequences, 2, 9, seed=sequences)
        torch.testing.assert_close(compiled(data), step(data))
