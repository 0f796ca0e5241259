"""What the tests of token_logprob share."""

import torch

from v05.kernels import token_logprob
from v05.testing import assert_as_exact_as, poisoned_outputs

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def random_rows(rows, columns, kind="normal", dtype=torch.float32, seed=0):
    """Logits `[rows, columns]` and targets `[rows]`; about a fifth of the targets are ignored."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=rng, dtype=torch.float64) * 3
    if kind == "peaked":
        logits[torch.arange(rows), torch.randint(columns, (rows,), generator=rng)] += 40
    elif kind == "flat":
        logits = torch.full_like(logits, -7.25)
    elif kind == "huge":
        logits = logits * 2000
    elif kind == "masked":
        logits[torch.rand(rows, columns, generator=rng) < 0.7] = -INF
    targets = torch.randint(columns, (rows,), generator=rng)
    targets[torch.rand(rows, generator=rng) < 0.2] = -100
    return logits.to(dtype), targets


def run(logits, targets, backend, weights=None, **options):
    """Log-prob, entropy and the gradient of a weighted sum of both; -inf log-probs take no part in it."""
    logits = logits.detach().requires_grad_()
    logprob, entropy = token_logprob(logits, targets, backend=backend, **options)
    rng = torch.Generator().manual_seed(5)
    g_l, g_h = torch.randn(2, len(targets), generator=rng, dtype=torch.float64).to(logprob.dtype)
    g_l, g_h = (g_l, g_h) if weights is None else (weights[0] * g_l, weights[1] * g_h)
    gradient = torch.autograd.grad((logprob, entropy), logits, (g_l, g_h))[0]
    return logprob.detach(), entropy.detach(), gradient


def compare(logits, targets, **options):
    exact = run(logits.double(), targets, "reference", **options)
    same = run(logits, targets, "reference", **options)
    with poisoned_outputs():
        results = run(logits, targets, "cpu", **options)
    for result, like, truth in zip(results, same, exact, strict=True):
        assert result.dtype == like.dtype
        assert_as_exact_as(result, like, truth)
