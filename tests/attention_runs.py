"""What the tests of query_attention share."""

import torch

from v05.kernels import query_attention
from v05.testing import FLOORS as TIGHT
from v05.testing import assert_as_exact_as, error_against, poisoned_outputs

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOORS = TIGHT | {torch.float64: 1e-10}


def attend(data, backend, **options):
    return query_attention(data.states, data.offsets, data.queries, data.weights, backend=backend, **options)


def widened(data):
    return data._make(value.double() if value.is_floating_point() else value for value in data)


def run(data, backend, **options):
    """Features, and the gradient of a weighted sum of them by everything that floats."""
    data = data._make(value.detach().requires_grad_(value.is_floating_point()) for value in data)
    features = attend(data, backend, heads=data.queries.shape[2] // 2, **options)
    rng = torch.Generator().manual_seed(5)
    upstream = torch.randn(features.shape[::-1], generator=rng, dtype=torch.float64).t().to(features.dtype)
    leaves = [value for value in data if value.requires_grad]
    return [features.detach(), *torch.autograd.grad(features, leaves, upstream)]


def compare(data, least=0.0, **options):
    """Features as exact as torch's, gradients of the order of its worst; in float64 both to 1e-10.

    A layer norm of a few numbers magnifies rounding, and a tensor of six of them tells little of how much.
    """
    exact = run(widened(data), "reference", **options)
    same = run(data, "reference", **options)
    with poisoned_outputs():
        results = run(data, "cpu", **options)
    errors = [error_against(like, truth) for like, truth in zip(same, exact, strict=True)]
    for i, (result, like, truth) in enumerate(zip(results, same, exact, strict=True)):
        assert result.dtype == like.dtype
        floor = (10 * max(errors) if i else 2 * errors[0]) + FLOORS[result.dtype] + least
        assert_as_exact_as(result, like, truth, floor)
