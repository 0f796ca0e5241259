"""query_attention: hand-computed numbers, torch's own attention, the oracle in every dtype, ragged edges."""

import math

import pytest
import torch
from attention_runs import BACKENDS, DTYPES, attend, compare, run
from padded_attention import attend_padded, attention_of, padded

from v05.kernels import AttentionWeights, query_attention
from v05.kernels.query_attention.rules import weight_shapes
from v05.testing import error_against, offsets_of, poisoned_outputs, ragged_states

LENGTHS = [3, 0, 1, 70, 33, 20]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def identity(heads=1, size=2, dtype=torch.float64):
    """Weights that leave everything as it is, for size = width."""
    width = 2 * heads
    eye, one, zero = (make(width, dtype=dtype) for make in (torch.eye, torch.ones, torch.zeros))
    return AttentionWeights(eye, zero, one, zero, one, zero, eye.repeat(3, 1), zero.repeat(3), eye, zero)


def test_hand_computed(backend):
    """A layer norm of two numbers gives 1 and -1, so the scores are 2 / sqrt 2 and its opposite."""
    states = torch.tensor([[3.0, 1.0], [2.0, 6.0], [5.0, 7.0]], dtype=torch.float64)
    queries = torch.tensor([[[9.0, 4.0]], [[0.0, 1.0]]], dtype=torch.float64)
    features = query_attention(
        states, torch.tensor([0, 2, 3]), queries, identity(), heads=1, eps=1e-14, backend=backend
    )
    p = 1 / (1 + math.exp(-2 * math.sqrt(2)))
    assert features[0].tolist() == pytest.approx([3 * p + 2 * (1 - p), p + 6 * (1 - p)])
    assert features[1].tolist() == pytest.approx([5, 7])


def test_each_weight_does_its_part(backend):
    """One token: attention is 1, so the features are out(Wv kv + bv), whatever queries and keys are."""
    data = ragged_states([1], heads=2, size=5, dtype=torch.float64)
    w = data.weights
    kv = data.states @ w.projection_weight.T + w.projection_bias
    value = kv @ w.in_weight[8:].T + w.in_bias[8:]
    expected = (value @ w.out_weight.T + w.out_bias).expand(168, 4).reshape(1, -1)
    torch.testing.assert_close(attend(data, backend, heads=2), expected)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("heads", [1, 3])
def test_agrees_with_torch_on_padded_states(backend, dtype, allowed, heads):
    """torch.nn.MultiheadAttention with a key_padding_mask, and the gradients of everything."""
    data = ragged_states([3, 1, 70, 33, 300], heads=heads, size=128, dtype=dtype)
    leaves = [value.requires_grad_() for value in data if value.is_floating_point()]
    own = attend(data, backend, heads=heads)
    filled, mask = padded(data.states, data.offsets)
    theirs = attend_padded(filled, mask, data.queries, data.weights, attention_of(data.weights, heads))
    upstream = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=dtype) / own[0].numel()
    assert error_against(own.detach(), theirs.detach()) < allowed
    gradients = (torch.autograd.grad(features, leaves, upstream) for features in (own, theirs))
    for mine, other in zip(*gradients, strict=True):
        assert error_against(mine, other) < allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_as_exact_as_torch(dtype, scale):
    compare(ragged_states(LENGTHS, dtype=dtype, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 31, 256, 257, 1024, 1025, 2100])
def test_sizes_of_states(dtype, size):
    compare(ragged_states([5, 30], size=size, count=5, dtype=dtype, seed=size))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 200])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_counts_of_queries_and_heads(count, heads):
    compare(ragged_states([4, 0, 40], count=count, heads=heads))


@pytest.mark.parametrize("length", [2, 31, 32, 33, 255, 256, 257, 511, 513, 2048])
def test_lengths(length):
    compare(ragged_states([length], count=9, size=16, seed=length))


def test_scores_that_grow_until_the_last_token():
    data = ragged_states([600], count=9, size=6, scale=30.0)
    data.states.copy_(data.states.abs().sort(0).values * torch.linspace(0, 30, 600)[:, None])
    compare(data)
    compare(data._replace(states=data.states.flip(0)))


def test_prompts_without_tokens(backend):
    """Their features are the output bias; their queries have gradient 0, and nothing else feels them."""
    for lengths in ([0, 4, 0, 0, 9, 0], [0, 0]):
        data = ragged_states(lengths, dtype=torch.float64)
        with poisoned_outputs():
            features, _, by_queries, *by_weights = run(data, backend)
        empty = torch.tensor(lengths) == 0
        assert torch.equal(features[empty].view(-1, 6), data.out_bias.expand(168 * int(empty.sum()), 6))
        assert not by_queries[empty].any()
        assert all(gradient.isfinite().all() for gradient in by_weights)
        assert by_queries[~empty].any() == bool((~empty).any())


def test_no_prompts(backend):
    results = run(ragged_states([], size=7), backend)
    assert list(results[0].shape) == [0, 1008]
    assert not any(gradient.any() for gradient in results[1:])


def test_gradcheck():
    data = ragged_states([2, 0, 5], count=3, heads=2, size=3, dtype=torch.float64)
    floats = [value.requires_grad_() for value in data if value.is_floating_point()]

    def function(states, queries, *weights):
        return query_attention(states, data.offsets, queries, AttentionWeights(*weights), heads=2, backend="cpu")

    assert torch.autograd.gradcheck(function, floats)


@pytest.mark.parametrize("wanted", ["states", "queries", "projection_weight", "out_bias"])
def test_one_gradient_alone(backend, wanted):
    data = ragged_states(LENGTHS)
    everything = run(data, backend)[1:]
    leaf = getattr(data, wanted).clone().requires_grad_()
    features = attend(data._replace(**{wanted: leaf}), backend)
    rng = torch.Generator().manual_seed(5)
    upstream = torch.randn(features.shape[::-1], generator=rng, dtype=torch.float64).t().float()
    (gradient,) = torch.autograd.grad(features, leaf, upstream)
    names = [name for name in data._fields if name != "offsets"]
    torch.testing.assert_close(gradient, everything[names.index(wanted)])


def test_other_floating_dtypes_are_cast(backend):
    data = ragged_states([4, 9], dtype=torch.float32)
    mixed = data._replace(queries=data.queries.double(), in_weight=data.in_weight.double())
    assert torch.equal(attend(mixed, backend), attend(data, backend))
    assert run(mixed, backend)[2].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_apart(dtype):
    data = ragged_states(LENGTHS, size=40, dtype=dtype)
    wide = torch.full((len(data.states), 50), float("nan"), dtype=dtype)
    wide[:, 3:43] = data.states
    expected = run(data, "cpu")
    layouts = [wide[:, 3:43], data.states.t().contiguous().t(), data.states.repeat_interleave(2, 0)[::2]]
    for layout in layouts:
        results = run(data._replace(states=layout), "cpu")
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_strided_rows_are_not_copied(monkeypatch):
    data = ragged_states([5, 5], size=40)
    states = data.states.repeat(1, 2)[:, :40]
    plain = torch.Tensor.contiguous
    seen = []
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: (seen.append(self.shape), plain(self))[1])
    attend(data._replace(states=states), "cpu")
    assert states.shape not in seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_else_is_in_the_batch(dtype):
    lengths = [1, 20, 300, 0, 33, 64, 5, 257, 90, 12]
    data = ragged_states(lengths, size=100, dtype=dtype)
    whole = run(data, "cpu")
    parts = data.states.split(lengths)
    by_states = whole[1].split(lengths)
    threads = torch.get_num_threads()
    upstream = torch.randn(10, 1008, generator=torch.Generator().manual_seed(0))

    def features_of(order):
        some = data._replace(
            states=torch.cat([parts[i] for i in order]).requires_grad_(),
            offsets=offsets_of(torch.tensor([lengths[i] for i in order])),
            queries=data.queries[order].detach().requires_grad_(),
        )
        features = attend(some, "cpu")
        return features, *torch.autograd.grad(features, (some.states, some.queries), upstream[order])

    expected, by_states, by_queries = features_of(list(range(10)))
    assert torch.equal(expected, whole[0])
    by_states = by_states.split(lengths)
    try:
        for seed in range(20):
            order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[: 10 - seed % 9].tolist()
            torch.set_num_threads(1 + seed % 4)
            features, states, queries = features_of(order)
            assert torch.equal(features, expected[order])
            assert torch.equal(queries, by_queries[order])
            assert torch.equal(states, torch.cat([by_states[i] for i in order]))
    finally:
        torch.set_num_threads(threads)


def test_same_bits_a_hundred_times():
    data = ragged_states([600, 3, 40], size=33, count=40)
    first = run(data, "cpu")
    threads = torch.get_num_threads()
    try:
        for i in range(100):
            torch.set_num_threads(1 + i % 3)
            assert all(torch.equal(*pair) for pair in zip(run(data, "cpu"), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        data = ragged_states([4, 0, 9], count=5, size=12, dtype=dtype)
        data = data._make(value.requires_grad_(value.is_floating_point()) for value in data)
        arguments = (data.states, data.offsets, data.queries, 3, 1e-5, "cpu", list(data.weights))
        torch.library.opcheck(torch.ops.v05.query_attention.default, arguments)


@pytest.mark.parametrize("which", BACKENDS)
def test_compiles_without_a_break(which):
    data = ragged_states([4, 0, 9], count=5, size=12)

    def loss(queries, *weights):
        some = data._replace(queries=queries, **dict(zip(AttentionWeights._fields, weights, strict=True)))
        return (attend(some, which) * torch.linspace(-1, 1, 30)).sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [value.detach().requires_grad_() for value in (data.queries, *data.weights)]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results)


def test_shapes_of_the_published_adapter():
    """Those of the checkpoint: proj_kv, mha.in_proj and mha.out_proj."""
    assert weight_shapes(6, 1024)[0] == (6, 1024)
    assert [weight_shapes(6, 1024)[i] for i in (6, 7, 8, 9)] == [(18, 6), (18,), (6, 6), (6,)]
