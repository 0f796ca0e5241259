"""The drop-in has the signature of verl's fused log-prob, which itself needs a GPU, and torch's numbers in float64."""

import inspect

import pytest
import torch
from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

from v05.integrations.verl import linear_cross_entropy

pytestmark = pytest.mark.verl


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_numbers_and_gradients(shape, reduction):
    torch.manual_seed(0)
    hidden = torch.randn(*shape, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, shape)
    logprobs, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, reduction)  # by position, as verl calls it
    logs = (hidden @ weight.T / 0.7).log_softmax(-1).flatten(0, -2)
    expected = logs.gather(1, labels.reshape(-1, 1)).squeeze(1)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(1))
    upstream = [torch.randn_like(logprobs), torch.randn_like(entropy)]
    ours = torch.autograd.grad([logprobs, entropy], (hidden, weight), upstream)
    theirs = torch.autograd.grad([expected, -(logs.exp() * logs).sum(1)], (hidden, weight), upstream)
    torch.testing.assert_close(ours, theirs)


def test_the_signature_is_verls():
    def names(function, skip):
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert names(linear_cross_entropy, 0) == names(LinearCrossEntropy.forward, 1)
    with pytest.raises(ValueError, match="reduction is 'max'; allowed: 'none', 'sum', 'mean'"):
        linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), 1.0, "max")
