"""query_attention in Triton against the reference: dtypes, ragged prompts, odd sizes, every gradient, the same bits."""

import pytest
import torch

from v05.kernels import query_attention
from v05.testing import FLOORS, assert_as_exact_as, error_against, offsets_of, poisoned_outputs, ragged_states

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def widened(data):
    return data._make(value.double() if value.is_floating_point() else value for value in data)


def run(data, backend):
    """Features, and the gradient of a weighted sum of them by everything that floats."""
    data = data._make(value.detach().requires_grad_(value.is_floating_point()) for value in data)
    heads = data.queries.shape[2] // 2
    with poisoned_outputs():
        features = query_attention(data.states, data.offsets, data.queries, data.weights, heads=heads, backend=backend)
        upstream = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features).sin()
        gradients = torch.autograd.grad(features, [value for value in data if value.requires_grad], upstream)
    return [features.detach(), *gradients]


def compare(data):
    results = [run(data, "triton"), run(data, "reference"), run(widened(data), "reference")]
    errors = [error_against(same, exact) for same, exact in zip(*results[1:], strict=True)]
    for i, (actual, same, exact) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == same.dtype
        # the interpreter truncates where a GPU rounds to bfloat16; a layer norm of a few numbers magnifies rounding
        floor = 1.6e-2 if actual.dtype == torch.bfloat16 else max(FLOORS[actual.dtype], 1e-10)
        assert_as_exact_as(actual, same, exact, floor + (10 * max(errors) if i else 2 * errors[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(dtype):
    compare(ragged_states([3, 0, 1, 70, 17, 16], count=20, size=40, dtype=dtype))


@pytest.mark.parametrize(("heads", "count", "size"), [(1, 1, 1), (2, 64, 130), (4, 33, 7)])
def test_other_shapes(heads, count, size):
    compare(ragged_states([5, 0, 20], heads=heads, count=count, size=size))


def test_the_published_shape_and_a_long_prompt():
    compare(ragged_states([40, 5], size=1024))


@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 0, 1]])
def test_next_to_nothing(lengths):
    compare(ragged_states(lengths, count=5, size=9))


def test_large_scores():
    compare(ragged_states([30, 65], count=20, size=9, scale=40.0))


def test_the_same_bits_alone_and_from_strided_rows():
    lengths = [9, 3, 40]
    data = ragged_states(lengths, count=20, size=40)
    whole = run(data, "triton")
    wide = torch.full((52, 50), float("nan"))
    wide[:, :40] = data.states
    for actual, expected in zip(run(data._replace(states=wide[:, :40]), "triton"), whole, strict=True):
        assert torch.equal(actual, expected)
    own = data.states.split(lengths)
    for i in range(3):
        alone = query_attention(
            own[i],
            offsets_of(torch.tensor(lengths[i : i + 1])),
            data.queries[i : i + 1],
            data.weights,
            backend="triton",
        )
        assert torch.equal(alone, whole[0][i : i + 1])
