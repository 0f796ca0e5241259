"""The backward of token_logprob as two ops: one that allocates the gradient, and one that writes it over the logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from v05.kernels import dispatch
from v05.kernels.custom import custom_op


@custom_op("v05::token_logprob_backward")
def backward(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    """Gradient `[T, V]` of the logits."""
    run = dispatch.implementation("token_logprob", backend).token_logprob_backward
    return run(
        logits, targets, temperatures, temperature, ignore_index, entropy, statistics, grad_logprob, grad_entropy
    )


@backward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@custom_op("v05::token_logprob_backward_into", mutates_args=("logits",))
def backward_into(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> None:
    """Writes the gradient over contiguous logits."""
    run = dispatch.implementation("token_logprob", backend).token_logprob_backward
    given = (targets, temperatures, temperature, ignore_index, entropy, statistics, grad_logprob, grad_entropy)
    run(logits, *given, grad_logits=logits)


@backward_into.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    backend: str,
) -> None:
    return None


def gradient_of(logits: Tensor, inplace: bool, *given: Any) -> Tensor:
    """Gradient of the logits, over them where that is asked for and they are contiguous."""
    if not (inplace and logits.is_contiguous()):
        return backward(logits, *given)
    gradient = logits.detach()
    backward_into(gradient, *given)
    return gradient
