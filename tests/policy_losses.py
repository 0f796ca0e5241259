"""policy_loss over ragged tokens, and over a single one."""

import math

import torch

from v05.kernels import policy_loss
from v05.testing import RaggedTokens

ARRAYS = ["logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs", "weights"]


def cast(data, dtype):
    return RaggedTokens(*(value.to(dtype) if value.is_floating_point() else value for value in data))


def options_for(data, kl="none", sampler_correction="none", **options):
    """The options, with the tensors they need."""
    options |= dict(kl=kl, sampler_correction=sampler_correction)
    if kl != "none":
        options.setdefault("kl_coef", 0.1)
        options["ref_logprobs"] = data.ref_logprobs
    if sampler_correction != "none":
        options["sampler_logprobs"] = data.sampler_logprobs
    return options


def run(data, backend=None, **options):
    """The loss, its gradient and the metrics, as tensors."""
    logprobs = data.logprobs.clone().requires_grad_()
    result = policy_loss(
        logprobs,
        data.old_logprobs,
        data.advantages,
        data.weights,
        sequence_offsets=data.sequence_offsets,
        backend=backend,
        **options_for(data, **options),
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert not any(value.requires_grad for value in result.metrics.values())
    return result.loss.detach(), gradient, result.metrics


def one_token(ratio, advantage, backend, **options):
    """Loss, gradient and metrics of a single token with a log-prob of -1."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64)
    data = RaggedTokens(
        logprobs,
        logprobs - math.log(ratio),
        torch.full_like(logprobs, -1.5),
        torch.full_like(logprobs, -1.25),
        torch.tensor([advantage], dtype=torch.float64),
        torch.ones_like(logprobs),
        torch.tensor([0, 1]),
    )
    loss, gradient, metrics = run(data, backend, **options)
    return loss.item(), gradient.item(), {name: value.item() for name, value in metrics.items()}
