"""query_attention on the device against float64: dtypes, lengths, sizes, heads, many prompts, strided rows, bits."""

import math

import pytest
import torch
from common import (
    BACKENDS,
    DEVICE,
    DTYPES,
    KERNELS,
    assert_same_bits,
    on_device,
    run_query_attention,
    scaled,
    widened,
)

from v05.kernels import query_attention
from v05.testing import FLOORS, assert_as_exact_as, error_against, offsets_of, poisoned_outputs, ragged_states

LENGTHS = [3, 0, 1, 70, 33, 20]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def compare(backend, data, **options):
    """Features of the order of torch's error, gradients of its worst; in float64 both to 1e-10.

    A gradient that cancels to nothing is made of terms as large as the others.
    """
    exact = run_query_attention("reference", widened(data), **options)
    same = run_query_attention("reference", data, **options)
    with poisoned_outputs():
        actual = run_query_attention(backend, data, **options)
    errors = {name: error_against(same[name], exact[name]) for name in exact}
    largest = max(float(values.double().abs().max()) for values in exact.values() if values.numel())
    for name, value in actual.items():
        assert value.dtype == same[name].dtype, name
        magnified = 5 * errors[name]
        if name != "features":
            magnified = 10 * max(errors.values()) + FLOORS[value.dtype] * largest
        assert_as_exact_as(value, same[name], exact[name], max(FLOORS[value.dtype], 1e-10) + magnified)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_dtypes_and_scores(backend, dtype, scale):
    compare(backend, on_device(ragged_states(LENGTHS, count=scaled(168, 20), dtype=dtype, scale=scale)))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "triton"])
@pytest.mark.parametrize("scale", [1e9, 1e20])
def test_scores_whose_rounding_is_large(backend, scale):
    """The backward's scores have the forward's bits, or powers overflow; Triton's compiler chooses how they round."""
    result = run_query_attention(backend, on_device(ragged_states([20, 300], count=9, scale=scale)))
    assert all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 8, 129, 1024, 1030])
def test_sizes_of_states(backend, dtype, size):
    compare(backend, on_device(ragged_states([5, 300 if size < 100 else 30], size=size, count=5, dtype=dtype)))


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 191, 192, 193, 257, 2048])
def test_lengths(backend, length):
    compare(backend, on_device(ragged_states([min(length, scaled(2048, 260))], count=scaled(168, 5), size=16)))


@pytest.mark.parametrize("count", [1, 16, 17, 191, 192, 193, 400])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_counts_of_queries_and_heads(backend, count, heads):
    compare(backend, on_device(ragged_states([4, 0, 20], count=count, heads=heads, size=12)))


def test_frozen_states(backend):
    compare(backend, on_device(ragged_states(LENGTHS, count=20)), for_states=False)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [0, 0, 1, 0]])
def test_next_to_nothing(backend, lengths):
    compare(backend, on_device(ragged_states(lengths, count=7, size=9)))


def test_more_prompts_than_a_grid_axis_holds_blocks(backend):
    lengths = torch.arange(scaled(70_001, 40)) % 4
    compare(backend, on_device(ragged_states(lengths, count=3, size=8)))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a long prompt is for a GPU")
def test_the_published_shape(backend):
    compare(backend, on_device(ragged_states([20, 2048, 700, 1, 333], size=1024, dtype=torch.bfloat16)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_same_bits_wherever_the_rows_lie(backend, dtype, offset):
    data = on_device(ragged_states([9, 20], count=9, size=61, dtype=dtype))
    expected = run_query_attention(backend, data)
    wide = torch.full((29, 80), math.nan, dtype=dtype, device=DEVICE)
    wide[:, offset : offset + 61] = data.states
    for states in (wide[:, offset : offset + 61], data.states.t().contiguous().t()):
        assert_same_bits(run_query_attention(backend, data._replace(states=states)), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_any_company(backend, dtype):
    """Features, and the gradients of queries and states; those of the weights are sums over the batch."""
    lengths = [20, 3, 70, 0, 130, 64, 1, 33]
    data = on_device(ragged_states(lengths, count=scaled(168, 9), size=40, dtype=dtype))
    whole = run_query_attention(backend, data)
    own, by_states = data.states.split(lengths), whole["gradient of states"].split(lengths)
    for seed in range(scaled(20, 3)):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[: 8 - seed % 7].tolist()
        offsets = offsets_of(torch.tensor([lengths[i] for i in order])).to(DEVICE)
        some = data._replace(states=torch.cat([own[i] for i in order]), offsets=offsets, queries=data.queries[order])
        result = run_query_attention(backend, some)
        assert torch.equal(result["features"], whole["features"][order])
        assert torch.equal(result["gradient of queries"], whole["gradient of queries"][order])
        assert torch.equal(result["gradient of states"], torch.cat([by_states[i] for i in order]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("states", math.nan, r"states\[0, 0\] is nan; allowed: finite"),
        ("queries", math.inf, r"queries\[0, 0, 0\] is inf"),
        ("in_weight", math.nan, r"weights.in_weight\[0, 0\] is nan"),
        ("offsets", 1, r"offsets\[0\] is 1; allowed: 0"),
    ],
)
def test_bad_values_are_named_where_asked_for(backend, name, value, message):
    data = on_device(ragged_states([2, 3], count=4, size=6))
    getattr(data, name).view(-1)[0] = value
    with pytest.raises(ValueError, match=message):
        query_attention(data.states, data.offsets, data.queries, data.weights, check_values=True, backend=backend)
