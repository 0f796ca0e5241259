"""What the tests of linear_logprob share."""

import pytest
import torch

from v05.kernels import linear_logprob
from v05.kernels.linear_logprob import reference
from v05.kernels.token_logprob import reference as token_logprob_reference
from v05.testing import FLOORS, assert_as_exact_as, error_against, poisoned_outputs

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def random_layer(rows, features, columns, kind="normal", dtype=torch.float32, seed=0, bias=False):
    """hidden `[rows, features]`, weight `[columns, features]`, targets, bias; about a fifth is ignored (and NaN)."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, features, generator=rng, dtype=torch.float64)
    weight = torch.randn(columns, features, generator=rng, dtype=torch.float64) * (3 / features**0.5)
    targets = torch.randint(columns, (rows,), generator=rng)
    if kind == "peaked":
        weight[::7] *= 12
    elif kind == "flat":
        weight[:] = weight[:1]
    elif kind == "huge":
        weight *= 2000
    ignored = torch.rand(rows, generator=rng) < 0.2
    targets[ignored], hidden[ignored] = -100, float("nan")
    own = torch.randn(columns, generator=rng, dtype=torch.float64).to(dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), targets, own


def run(hidden, weight, targets, bias=None, backend="cpu", dtype=None, uses=(1.0, 1.0), **options):
    """Log-prob, entropy, and gradients of a weighted sum of both, by hidden, weight and bias."""
    given = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden, weight, bias)]
    outputs = linear_logprob(*given[:2], targets, bias=given[2], backend=backend, **options)
    rng = torch.Generator().manual_seed(5)
    upstream = torch.randn(2, len(targets), generator=rng, dtype=torch.float64).to(outputs.logprob.dtype)
    upstream = [use * values for use, values in zip(uses, upstream, strict=True)]
    gradients = torch.autograd.grad(tuple(outputs), [x for x in given if x is not None], upstream)
    return [x.detach() for x in (*outputs, *gradients)]


def plain(hidden, weight, bias, targets, temperatures, temperature, ignore_index):
    """What a trainer would write: the product in the dtype of its operands, the rest in float32."""
    logits = torch.where((targets != ignore_index)[:, None], hidden, 0) @ weight.t()
    logits = logits if bias is None else logits + bias
    return token_logprob_reference.token_logprob(logits, targets, temperatures, temperature, ignore_index)


def run_plain(hidden, weight, targets, bias=None, uses=(1.0, 1.0), temperature=1.0, chunk=None):
    """As `run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "linear_logprob", plain)
        return run(hidden, weight, targets, bias, "reference", uses=uses, temperature=temperature)


def compare(hidden, weight, targets, bias=None, slack=0.0, **options):
    """Log-probs and entropies as exact as torch's from a float32 product, gradients as those of the operands' dtype."""
    exact = run(hidden, weight, targets, bias, "reference", torch.float64, **options)
    same = run(hidden, weight, targets, bias, "reference", **options)
    same[2:] = run_plain(hidden, weight, targets, bias, **options)[2:]
    with poisoned_outputs():
        results = run(hidden, weight, targets, bias, **options)
    for result, like, truth in zip(results, same, exact, strict=True):
        assert result.dtype == like.dtype
        # two sums of the same products in other orders: now and then the one or the other is more than twice as far off
        assert_as_exact_as(result, like, truth, slack + 3 * max(FLOORS[result.dtype], error_against(like, truth)))
