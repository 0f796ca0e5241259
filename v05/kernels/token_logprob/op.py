"""The public `token_logprob`: log-probability of chosen tokens and entropy, in one read of the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import custom_op
from v05.kernels.token_logprob import parallel, reference
from v05.kernels.token_logprob.backward import gradient_of
from v05.kernels.token_logprob.ranks import check_split
from v05.kernels.token_logprob.rules import by_row, check_shapes
from v05.kernels.token_logprob.rules import check_values as check_logit_values


class TokenLogprob(NamedTuple):
    """`logprob` `[T]`: log p of each target. `entropy` `[T]`: of each row's distribution, in nats."""

    logprob: Tensor
    entropy: Tensor


@custom_op("v05::token_logprob")
def _token_logprob(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("token_logprob", backend).token_logprob
    return run(logits, targets, temperatures, temperature, ignore_index)


@_token_logprob.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], segments.working_dtype(logits)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(2, rows, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, temperatures, *ctx.numbers, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, temperatures, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    logits, targets, temperatures, entropy, statistics = ctx.saved_tensors
    grad_logits = None
    if grad_logprob is not None or grad_entropy is not None:
        given = (targets, temperatures, *ctx.numbers, entropy, statistics, grad_logprob, grad_entropy, ctx.backend)
        grad_logits = gradient_of(logits, ctx.inplace, *given)
    return grad_logits, *[None] * 6


_token_logprob.register_autograd(_backward, setup_context=_setup_context)


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    group: dist.ProcessGroup | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> TokenLogprob:
    """Log-probability of each target, and entropy, under softmax(logits / temperature); differentiable in the logits.

    Args:
        logits: `[T, V]` float32, float64, bfloat16 or float16. -inf masks a token out of the vocabulary; NaN and inf
            are not allowed. Rows may lie apart (a slice of something wider) without a copy.
        targets: `[T]` int64, in 0 to V - 1, or `ignore_index`.
        temperature: a float, or `[T]` floating, one per row, from 1e-6 to 1e6; not differentiable.
        ignore_index: a target that gives log-prob 0, entropy 0 and gradient 0, whatever the logits of its row.
        inplace_backward: write the gradient over the logits, where they are contiguous, which saves their size in
            memory: for logits that nothing reads any more. A second backward, or one of another op that kept them,
            raises; the reference backend ignores it.
        group: ranks among which the vocabulary is split, in their order, as tensor parallelism splits an output layer:
            logits are this rank's columns, V is the sum over ranks, and targets and temperature are the same on all, as
            what is made of the outputs has to be. One all-gather forward, of five numbers a row, nothing backward. Not
            within torch.compile, nor with the reference. What one rank refuses all of them raise, as for
            `linear_logprob`.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"`, `"triton"`, `"cuda"`.

    Returns:
        `TokenLogprob` of two `[T]` float32, or float64 for float64 logits, in nats; accumulated in float32 or wider.
        A target at -inf has log-prob -inf; a row of -inf alone has log-prob -inf, entropy 0 and gradient 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: the gradient is dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature; the sums are gathered
    online (Milakov and Gimelshein, arXiv 1805.02867).
    """

    def described() -> tuple[parallel.Rows, str]:
        check_shapes(logits, targets, temperature)
        temperatures, scalar = by_row(temperature)
        chosen = dispatch.backend_for("token_logprob", logits, backend)
        given = parallel.Rows(logits, targets, temperatures, scalar)
        if group is not None:
            check_split(chosen, given)
        return given, chosen

    if group is not None:
        ranks = parallel.ranks_of(group, check_values, logits)
        given, chosen = ranks.alike(described)
        rest = (ignore_index, inplace_backward, ranks, check_values, chosen)
        return TokenLogprob(*parallel.token_logprob(given, *rest))
    (_, _, temperatures, scalar), chosen = described()
    if check_values or (chosen == "reference" and segments.readable(logits)):
        check_logit_values(logits.detach(), targets, temperatures, ignore_index)
    if chosen == "reference":
        return TokenLogprob(*reference.token_logprob(logits, targets, temperatures, scalar, ignore_index))
    logprob, entropy, _ = _token_logprob(logits, targets, temperatures, scalar, ignore_index, inplace_backward, chosen)
    return TokenLogprob(logprob, entropy)
