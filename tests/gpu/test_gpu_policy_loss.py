"""policy_loss on the device against float64: every choice with its gradient, masks, sizes, bits and refusals."""

import itertools
import math

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    DTYPES,
    KERNELS,
    compare,
    needs_gpu,
    on_device,
    run_policy_loss,
    scaled,
    tokens_of,
    widened,
)

from v05.kernels import policy_loss
from v05.kernels.policy_loss.options import CORRECTIONS, KLS, LEVELS, METRICS, SURROGATES
from v05.testing import RaggedTokens, error_against, offsets_of

ARRAYS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "weights")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def choices():
    """Every surrogate at every level, each with another KL and correction, then every pair of these."""
    others = zip(itertools.cycle(KLS), itertools.cycle(CORRECTIONS), strict=True)
    yield from ((*pair, *other) for pair, other in zip(itertools.product(SURROGATES, LEVELS), others, strict=False))
    for i, (kl, correction) in enumerate(itertools.product(KLS, CORRECTIONS)):
        yield "ppo", LEVELS[i % 2], kl, correction


@pytest.mark.parametrize(("surrogate", "level", "kl", "correction"), list(dict.fromkeys(choices())))
def test_every_choice(backend, surrogate, level, kl, correction):
    data = tokens_of(scaled(90, 12), 60, seed=1)
    compare(run_policy_loss, backend, data, surrogate=surrogate, level=level, kl=kl, correction=correction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_dtypes(backend, dtype, level):
    data = tokens_of(scaled(90, 12), 60, dtype, seed=2)
    compare(run_policy_loss, backend, data, level=level, kl="k3", correction="token_truncate")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_that_take_many_tiles(backend, level, dtype):
    """Some sequences without a token, or without one that counts, or whose first ones do not."""
    data = tokens_of(scaled(6000, 90), 600, dtype, seed=5)
    weights = data.weights.clone()
    bounds = data.sequence_offsets.tolist()
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        if s % 7 < 2:
            weights[start : end if s % 7 else start + min(40, (end - start) // 2)] = 0
    data = data._replace(weights=weights)
    compare(run_policy_loss, backend, data, level=level)
    spread = data._replace(advantages=torch.linspace(-2, 2, len(weights), dtype=dtype, device=DEVICE))
    compare(run_policy_loss, backend, spread, level=level, kl="k3")


@needs_gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("sequences", [3, 400])
def test_a_graph_scales_the_gradient_by_what_was_just_copied(backend, sequences):
    """The launch that scales begins early, whatever comes before it, and waits."""
    data, source = tokens_of(sequences, 60, seed=6), torch.tensor(3.0, device=DEVICE)
    factor, leaf = torch.zeros_like(source), data.logprobs.requires_grad_()

    def scaled_by(write):
        given = (leaf, data.old_logprobs, data.advantages, data.weights)
        loss = policy_loss(*given, sequence_offsets=data.sequence_offsets, backend=backend).loss
        write()
        return torch.autograd.grad(loss, leaf, factor)[0]

    writes = (lambda: factor.copy_(source), lambda: factor.zero_(), lambda: torch.add(source, 1, out=factor))
    exact = scaled_by(lambda: factor.fill_(1))
    for write, by in zip(writes, (lambda: source, lambda: source * 0, lambda: source + 1), strict=True):
        graph = torch.cuda.CUDAGraph()
        scaled_by(write)
        with torch.cuda.graph(graph):
            gradient = scaled_by(write)
        for value in (3.0, 0.5, 3.0):
            source.fill_(value)
            graph.replay()
            torch.testing.assert_close(gradient, exact * by(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [1, 255, 256, 511, 512, 513, 1024, 2048, 2049, 4096, 4097, 8192, 8195])
def test_blocks_that_end_anywhere(backend, level, tokens):
    data = tokens_of(tokens, 1, seed=tokens)
    compare(run_policy_loss, backend, data, level=level)
    one = tokens_of(1, tokens, seed=3)
    compare(run_policy_loss, backend, one, level=level, correction="sequence_mask")


@pytest.mark.parametrize("tokens", [511, 512, 513, 515, 1027])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_views_that_begin_anywhere(backend, level, dtype, tokens):
    """Arrays that are not at a multiple of 16 bytes, each at its own place, have the values of those that are."""
    data = tokens_of(tokens, 1, dtype, seed=tokens)
    per_token = data._replace(advantages=torch.linspace(-2, 2, len(data.logprobs), dtype=dtype, device=DEVICE))
    for given in (data, per_token, tokens_of(1, tokens, dtype, seed=4)):
        places = dict(zip((*ARRAYS, "advantages"), (1, 2, 3, 5, 7, 1), strict=True))
        views = {
            name: torch.cat([value.new_zeros(at), value])[at:]
            for name, at in places.items()
            for value in [getattr(given, name)]
        }
        options = dict(level=level, kl="k3", correction="token_mask")
        compare(run_policy_loss, backend, given._replace(**views), **options)


@pytest.mark.parametrize("level", LEVELS)
def test_sequences_longer_than_a_block_and_blocks_of_many_sequences(backend, level):
    compare(run_policy_loss, backend, tokens_of(scaled(12, 2), 6000, seed=4), level=level)
    compare(run_policy_loss, backend, tokens_of(scaled(5000, 900), 3, seed=5), level=level)


@pytest.mark.parametrize("options", [{}, dict(surrogate="sapo", kl="k3+"), dict(correction="sequence_mask")])
@pytest.mark.parametrize("level", LEVELS)
def test_one_sequence_that_is_much_longer(backend, level, options):
    """Beside sequences of no token, of one and of a few, and at any place."""
    data = tokens_of(scaled(40, 4), 5000, seed=14)
    tokens = len(data.logprobs)
    ends = [0, 0, 1, 4, 4, *range(5, 400, 3), tokens - 700, tokens - 699, tokens - 1, tokens, tokens]
    advantages = torch.linspace(-2, 2, len(ends) - 1, device=DEVICE)
    skewed = data._replace(sequence_offsets=torch.tensor(ends, device=DEVICE), advantages=advantages)
    compare(run_policy_loss, backend, skewed, level=level, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_more_sequences_than_a_grid_axis_holds_blocks(backend, level):
    data = tokens_of(scaled(70_003, 500), 4, torch.float64, seed=6)
    compare(run_policy_loss, backend, data, level=level, correction="sequence_truncate")


@pytest.mark.parametrize("level", LEVELS)
def test_advantages_per_token(backend, level):
    data = tokens_of(20, 50, seed=7)
    per_token = torch.linspace(-2, 2, data.logprobs.numel(), device=DEVICE)
    compare(run_policy_loss, backend, data._replace(advantages=per_token), level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_a_masked_token_holds_does_not_matter(backend, level, value):
    data = tokens_of(20, 60, seed=8, masked=0.5)
    masked = data.weights == 0
    spoiled = data._replace(**{name: getattr(data, name).masked_fill(masked, value) for name in ARRAYS[:4]})
    options = dict(level=level, kl="k3", correction="sequence_truncate", surrogate="kl_cov")
    clean, dirty = (run_policy_loss(backend, d, **options) for d in (data, spoiled))
    for name, result in clean.items():
        # a reference adds up with atomics, in any order
        assert error_against(dirty[name], result) <= (1e-5 if backend == "reference" else 0), name


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_do(backend, level):
    for data in (tokens_of(0, 0), tokens_of(3, 0), tokens_of(5, 9, masked=1.1)):
        for name, value in compare(run_policy_loss, backend, data, level=level, correction="sequence_mask").items():
            assert not value.any(), name


def test_minus_infinity_where_the_result_is_finite(backend):
    logprobs = torch.tensor([-math.inf, -math.inf, -1.0, -1.0])
    old = torch.tensor([-math.inf, -2.0, -math.inf, -1.0])
    data = on_device(RaggedTokens(logprobs, old, old, old, torch.ones(1), torch.ones(4), torch.tensor([0, 4])))
    for level, correction, kl in itertools.product(LEVELS, CORRECTIONS, ("none", "k3")):
        result = run_policy_loss(backend, data, level=level, correction=correction, kl=kl)
        assert all(value.isfinite().all() for value in result.values())
        assert not result["gradient"][:3].any()


@pytest.mark.skipif("cpu" in BACKENDS, reason="refused on the CPU")
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_nan_that_counts_is_seen(name, surrogate):
    """Unless asked to check values, nothing waits for the device: then NaN must come out, not a number."""
    if surrogate in ("gpg", "reinforce") and name == "old_logprobs":
        surrogate = "ppo"  # these have no ratio
    data = tokens_of(4, 9, seed=9, masked=0.0)
    selected = int(data.weights.nonzero()[1])
    getattr(data, name)[selected] = math.nan
    for backend in KERNELS:
        result = run_policy_loss(backend, data, surrogate=surrogate, kl="k3", correction="token_truncate")
        assert result["loss"].isnan(), backend


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_has_the_same_bits_in_any_company(backend, level):
    data = tokens_of(scaled(60, 16), 700, seed=10)._replace()
    host = data._make(values.cpu() for values in data)
    lengths, count = host.sequence_offsets.diff(), len(host.advantages)
    for surrogate, correction in (("ppo", "none"), ("sapo", "sequence_truncate"), ("cispo", "token_mask")):
        options = dict(level=level, surrogate=surrogate, kl="k3", correction=correction)
        gradient = run_policy_loss(backend, data, **options)["gradient"]
        for seed in range(scaled(20, 2)):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count - seed]
            spans = [torch.arange(*host.sequence_offsets[s : s + 2].tolist()) for s in order]
            source = torch.cat(spans)
            arrays = {name: getattr(host, name)[source] for name in ARRAYS}
            other = RaggedTokens(
                **arrays, advantages=host.advantages[order], sequence_offsets=offsets_of(lengths[order])
            )
            mixed = run_policy_loss(backend, on_device(other), **options)["gradient"]
            assert torch.equal(mixed, gradient[source.to(DEVICE)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_split_batch_has_the_same_gradient(backend, level):
    data = widened(tokens_of(24, 30, seed=11))
    options = dict(level=level, surrogate="cispo", kl="k3", correction="sequence_mask")
    whole = run_policy_loss(backend, data, **options)
    edges = data.sequence_offsets.cpu()
    for ways in (2, 4, 8):
        results = []
        for first, last in itertools.pairwise(range(0, 25, 24 // ways)):
            tokens = slice(int(edges[first]), int(edges[last]))
            arrays = {name: getattr(data, name)[tokens] for name in ARRAYS}
            offsets = data.sequence_offsets[first : last + 1] - edges[first].item()
            part = RaggedTokens(**arrays, advantages=data.advantages[first:last], sequence_offsets=offsets)
            results.append(run_policy_loss(backend, part, **options))
        joined = torch.cat([result["gradient"] for result in results])
        torch.testing.assert_close(joined, whole["gradient"], rtol=1e-12, atol=1e-12)
        for name in ("loss", *METRICS):
            total = torch.stack([result[name] for result in results]).sum()
            torch.testing.assert_close(total, whole[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_graph_that_is_kept_gives_its_gradient_again(backend, factor):
    data = tokens_of(scaled(300, 9), 60, seed=8)
    leaf = data.logprobs.detach().requires_grad_()
    given = (data.old_logprobs, data.advantages, data.weights)
    loss = policy_loss(leaf, *given, sequence_offsets=data.sequence_offsets, backend=backend).loss * factor
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone() for _ in range(2))
    (last,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, last, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logprobs=[0.0, 0, 0, math.nan]), r"logprobs\[3\] is nan \(sequence 1\); allowed: below inf"),
        (dict(old_logprobs=[0.0, 0, math.inf, 0]), r"old_logprobs\[2\] is inf \(sequence 1\)"),
        (dict(advantages=[0.0, math.nan]), r"advantages\[1\] is nan; allowed: finite"),
        (dict(weights=[1.0, 1, math.nan, 1]), r"weights\[2\] is nan \(sequence 1\); allowed: finite"),
        (dict(sequence_offsets=[0, 2, 3]), r"sequence_offsets\[2\] is 3; allowed: 4"),
        (dict(sequence_offsets=[0, 9, 4]), r"sequence_offsets\[2\] is 4; allowed: 9"),
    ],
)
def test_bad_values_are_named_where_asked_for(backend, change, message):
    given = dict.fromkeys(ARRAYS, [-1.0] * 4) | dict(advantages=[1.0, 1.0], sequence_offsets=[0, 2, 4]) | change
    data = on_device(RaggedTokens(**{name: torch.tensor(values) for name, values in given.items()}))
    with pytest.raises(ValueError, match=message):
        run_policy_loss(backend, data, check_values=True)
