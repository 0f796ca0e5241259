"""policy_loss: masked tokens, infinities, batches where nothing speaks, and bad input."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_losses import ARRAYS, cast, run

from v05.kernels import policy_loss
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, SURROGATES
from v05.testing import RaggedTokens, offsets_of, ragged_tokens

BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


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


@pytest.mark.parametrize(("cap", "floor"), [(4.0, 0.25), (1.0, 1.0), (0.5, 0.5)])
def test_the_floor_of_sampler_weights_is_never_above_their_cap(backend, cap, floor):
    data = ragged_tokens(9, 1, 9, seed=2)
    options = dict(sampler_correction="token_mask", sampler_cap=cap)
    torch.testing.assert_close(run(data, backend, **options), run(data, backend, sampler_floor=floor, **options))


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
