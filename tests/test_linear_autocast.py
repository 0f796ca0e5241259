"""Under autocast the ops with an output layer take what `F.linear` takes, and give what they give after a cast."""

import pytest
import torch

from v05.kernels import linear_logprob, linear_policy_loss

TARGETS, OFFSETS, ADVANTAGES = torch.tensor([0, 3, 6, 2, 1]), torch.tensor([0, 2, 5]), torch.tensor([1.0, -0.5])


def by_logprob(hidden, weight, bias):
    logprob, entropy = linear_logprob(hidden, weight, TARGETS, bias=bias)
    return (logprob * torch.arange(5.0)).sum() + entropy.sum()


def by_loss(hidden, weight, bias):
    rest = (torch.full((5,), -2.0), ADVANTAGES, torch.full((5,), 0.2))
    return linear_policy_loss(hidden, weight, TARGETS, *rest, bias=bias, sequence_offsets=OFFSETS).loss


def layer(*dtypes):
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 16), (7, 16), (7,))
    return [
        torch.randn(size, generator=generator).to(dtype).requires_grad_()
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]


@pytest.mark.parametrize("function", [by_logprob, by_loss])
@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_mixed_dtypes_are_cast_and_gradients_come_in_their_own(function, hidden, compiled):
    given = layer(hidden, torch.float32, torch.float32)
    run = torch.compile(function, fullgraph=True) if compiled else function
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = run(*given)
    expected = function(*(x.to(torch.bfloat16) for x in given))
    torch.testing.assert_close(value, expected)
    for found, wanted, leaf in zip(*(torch.autograd.grad(x, given) for x in (value, expected)), given, strict=True):
        assert found.dtype == leaf.dtype
        torch.testing.assert_close(found, wanted)


def test_float64_and_what_is_outside_of_autocast_stay():
    given = layer(*[torch.float64] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = by_logprob(*given)
    assert torch.equal(value, by_logprob(*given))
    with pytest.raises(TypeError, match=r"weight is torch.float32; allowed: torch.bfloat16"):
        by_logprob(*layer(torch.bfloat16, torch.float32, torch.float32))
