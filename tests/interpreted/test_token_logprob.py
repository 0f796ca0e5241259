"""token_logprob in Triton against the reference: dtypes, odd vocabularies, masked and ignored rows, both gradients."""

import pytest
import torch

from v05.kernels import token_logprob
from v05.testing import assert_as_exact_as, poisoned_outputs

INFINITY = float("inf")


def run(backend, logits, targets, temperature, dtype=None):
    logits = (logits if dtype is None else logits.to(dtype)).clone().requires_grad_()
    with poisoned_outputs():
        logprob, entropy = token_logprob(logits, targets, temperature=temperature, backend=backend)
        finite = torch.where(logprob > -INFINITY, logprob, 0)
        scale = torch.linspace(0.5, 2, targets.numel(), dtype=logprob.dtype)
        (gradient,) = torch.autograd.grad((scale * finite + 0.3 * entropy).sum(), logits)
    return logprob.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 7, 4096, 4500])
@pytest.mark.parametrize("per_row", [False, True])
def test_against_the_reference(dtype, columns, per_row):
    rng = torch.Generator().manual_seed(columns)
    logits = (4 * torch.randn(7, columns, generator=rng, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, columns, (7,), generator=rng)
    logits[1] = float("nan")
    targets[1] = -100
    logits[2] = -INFINITY
    if columns > 1:
        logits[3, columns // 2 :] = -INFINITY
        targets[3] = 0
        logits[4, : columns // 2] = -INFINITY
        targets[4] = columns - 1
    logits[5] *= 30
    temperature = torch.linspace(0.5, 1.5, 7, dtype=torch.float64) if per_row else 0.7
    results = [run("triton", logits, targets, temperature), run("reference", logits, targets, temperature)]
    results.append(run("reference", logits, targets, temperature, torch.float64))
    for actual, same, exact in zip(*results, strict=True):
        # the interpreter truncates where a GPU rounds to bfloat16
        assert_as_exact_as(actual, same, exact, floor=1.6e-2 if actual.dtype == torch.bfloat16 else None)


def test_strided_rows_and_the_same_bits_alone():
    logits = torch.randn(6, 900, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    strided, alone = logits[::2, :450], logits[4:5, :450].contiguous()
    whole = token_logprob(strided, targets[::2], backend="triton")
    single = token_logprob(alone, targets[4:5], backend="triton")
    assert torch.equal(whole.logprob[2:], single.logprob)
    assert torch.equal(whole.entropy[2:], single.entropy)


def test_a_gradient_in_place_has_the_same_bits():
    source = torch.randn(5, 5000, generator=torch.Generator().manual_seed(0))
    gradients = []
    for inplace in (False, True):
        logits = source.clone().requires_grad_()
        outputs = token_logprob(logits, torch.arange(5), inplace_backward=inplace, backend="triton")
        gradients += torch.autograd.grad([values.sum() for values in outputs], logits)
    assert torch.equal(*gradients)


def test_no_rows():
    logprob, entropy = token_logprob(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), backend="triton")
    assert logprob.numel() == entropy.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_the_loss_masks_may_hold_anything(dtype, inplace):
    """Their upstream gradient is 0: so is theirs, and no other row's bits change."""
    source = torch.randn(6, 3001, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = torch.tensor([1.5, 0, -1, 0, 2, 0])
    gradients = []
    for held in (0.5, float("nan")):
        logits = source.clone()
        logits[1::2] = held
        with poisoned_outputs():
            outputs = token_logprob(
                logits.requires_grad_(), torch.arange(6), inplace_backward=inplace, backend="triton"
            )
            weighed = [upstream.to(values.dtype) for values in outputs]
            gradients += torch.autograd.grad(outputs, logits, weighed)
    assert not gradients[1][1::2].any()
    assert gradients[1][::2].any(1).all()
    assert torch.equal(*gradients)
