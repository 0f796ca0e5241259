"""policy_loss in Triton against the reference: every choice, value, gradient and metrics, with poisoned outputs."""

import pytest
import torch

from v05.kernels import policy_loss
from v05.kernels.policy_loss import triton as backend
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, SURROGATES
from v05.testing import assert_as_exact_as, poisoned_outputs, ragged_tokens


def run(name, data, surrogate="ppo", level="token", kl="none", correction="none", advantages=None):
    logprobs = data.logprobs.clone().requires_grad_()
    options = {"surrogate": surrogate, "level": level, "sequence_offsets": data.sequence_offsets, "backend": name}
    if kl != "none":
        options |= {"ref_logprobs": data.ref_logprobs, "kl": kl, "kl_coef": 0.3}
    if correction != "none":
        options |= {"sampler_logprobs": data.sampler_logprobs, "sampler_correction": correction, "sampler_cap": 1.5}
    if surrogate in ("clip_cov", "kl_cov"):
        options |= {"covariance_selected": torch.arange(logprobs.numel()) % 3 == 0}
    if surrogate == "ppo":
        options |= {"dual_clip": 3.0}
    advantages = data.advantages if advantages is None else advantages.to(logprobs.dtype)
    with poisoned_outputs():
        loss, metrics = policy_loss(logprobs, data.old_logprobs, advantages, data.weights, **options)
        (gradient,) = torch.autograd.grad(loss * 1.5, logprobs)
    return loss.detach(), gradient, torch.stack(list(metrics.values()))


def compare(data, **choices):
    wide = data._make(value.double() if value.is_floating_point() else value for value in data)
    results = (run("triton", data, **choices), run("reference", data, **choices), run("reference", wide, **choices))
    for actual, same, exact in zip(*results, strict=True):
        assert_as_exact_as(actual, same, exact)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogates(surrogate, level, dtype):
    compare(ragged_tokens(30, 0, 90, seed=1, dtype=dtype), surrogate=surrogate, level=level)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_kl_and_corrections(kl, correction, level):
    compare(ragged_tokens(12, 0, 90, seed=2), kl=kl, correction=correction, level=level)


def test_sequences_longer_than_a_block_and_blocks_of_many_sequences():
    data = ragged_tokens(4, 1500, 2600, seed=3)
    compare(data, level="sequence", correction="sequence_truncate")
    compare(data)
    compare(ragged_tokens(900, 0, 3, seed=4))


@pytest.mark.parametrize("options", [{}, {"surrogate": "sapo", "kl": "k3+"}, {"correction": "sequence_mask"}])
def test_programs_that_take_several_sequences_of_skewed_lengths(options, monkeypatch):
    monkeypatch.setattr(backend, "MOST", 3)
    data = ragged_tokens(1, 3500, 3500, seed=5)
    ends = torch.tensor([0, 0, 1, 4, 4, 3100, 3101, 3499, 3500, 3500])
    data = data._replace(sequence_offsets=ends, advantages=torch.linspace(-2, 2, len(ends) - 1))
    for level in LEVELS:
        compare(data, level=level, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_advantages_per_token(level):
    data = ragged_tokens(9, 0, 50, seed=5)
    compare(data, level=level, advantages=torch.linspace(-2, 2, data.logprobs.numel()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_masked_tokens_may_hold_anything(level, value):
    data = ragged_tokens(8, 0, 60, seed=6, masked=0.5)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    poisoned = data._replace(**{name: getattr(data, name).masked_fill(data.weights == 0, value) for name in names})
    for surrogate, correction in zip(SURROGATES, [*CORRECTIONS, *CORRECTIONS], strict=False):
        options = dict(level=level, surrogate=surrogate, kl="k3", correction=correction)
        clean, dirty = run("triton", data, **options), run("triton", poisoned, **options)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("tokens", [1, 511, 512, 513, 1023, 1024, 1026, 1536])
@pytest.mark.parametrize("level", LEVELS)
def test_blocks_that_end_anywhere_and_views_that_are_not_aligned(tokens, level):
    data = ragged_tokens(1, tokens, tokens, seed=tokens)
    compare(data, level=level)
    compare(data, level=level, kl="k3")
    compare(data._replace(logprobs=torch.cat([data.logprobs[:1], data.logprobs])[1:]), level=level)


def test_nothing_to_do():
    for data in (ragged_tokens(3, 0, 0), ragged_tokens(5, 1, 9, masked=1.1)):
        loss, gradient, metrics = run("triton", data)
        assert loss == 0
        assert not gradient.any()
        assert not metrics.any()


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_graph_that_is_kept_gives_its_gradient_again(factor):
    data = ragged_tokens(9, 0, 20, seed=3)
    logprobs = data.logprobs.clone().requires_grad_()
    given = (data.old_logprobs, data.advantages, data.weights)
    loss = policy_loss(logprobs, *given, sequence_offsets=data.sequence_offsets, backend="triton").loss * factor
    first, second = (torch.autograd.grad(loss, logprobs, retain_graph=True)[0].clone() for _ in range(2))
    (last,) = torch.autograd.grad(loss, logprobs)
    assert torch.equal(first, second)
    assert torch.equal(first, last)
