"""The public `linear_logprob`: log-prob of chosen tokens and entropy, straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import custom_op
from v05.kernels.linear_logprob import parallel, reference
from v05.kernels.linear_logprob.autocast import as_linear
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.passes import Needs
from v05.kernels.linear_logprob.rules import check_logits, check_shapes, chunk_of
from v05.kernels.token_logprob.op import TokenLogprob
from v05.kernels.token_logprob.ranks import check_split
from v05.kernels.token_logprob.rules import by_row, check_targets
from v05.kernels.token_logprob.softmax import Softmax


def check_given(given: Inputs, ignore_index: int) -> None:
    """Raises at a target or temperature that is not allowed; waits for the device."""
    but = f", or ignore_index {ignore_index}"
    check_targets(given.targets, given.temperatures, given.columns, given.targets != ignore_index, but)


def _prepared(given: Inputs, ignore_index: int) -> Inputs:
    """Targets checked where that waits for nothing, and told apart from those that are ignored."""
    if given.hidden.device.type == "cpu":
        check_given(given, ignore_index)
    return given.localised(ignore_index)


@custom_op("v05::linear_logprob")
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given = _prepared(Inputs(hidden, weight, bias, targets, temperatures, temperature), ignore_index)
    softmax = dispatch.implementation("linear_logprob", backend).forward(given, chunk)
    return softmax.logprob, softmax.entropy, softmax.statistics


@_linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, wide = hidden.shape[0], Inputs(hidden, weight, bias, targets, temperatures, temperature).wide
    sizes = ((rows,), (rows,), (2, rows))
    return tuple(hidden.new_empty(size, dtype=wide) for size in sizes)  # type: ignore[return-value]


@custom_op("v05::linear_logprob_backward")
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    given = Inputs(hidden, weight, bias, targets, temperatures, temperature).localised(ignore_index)
    softmax = Softmax(entropy, entropy, *statistics)
    upstream = [None if values is None else values.contiguous() for values in (by_logprob, by_entropy)]
    run = dispatch.implementation("linear_logprob", backend).backward
    made = run(given, softmax, *upstream, Needs(*needs), chunk)
    likes = zip(made, (hidden, weight, weight if bias is None else bias), strict=True)
    return tuple(  # type: ignore[return-value]
        like.new_empty(0) if gradient is None else gradient.to(like.dtype) for gradient, like in likes
    )


@_linear_logprob_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    ignore_index: int,
    entropy: Tensor,
    statistics: Tensor,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
    needs: Sequence[bool],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, bias, needs)


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, uninitialised; without elements where not wanted."""
    likes = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(  # type: ignore[return-value]
        like.new_empty(like.shape if needed else 0) for like, needed in zip(likes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, temperatures, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, bias, targets, temperatures, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, entropy, statistics = ctx.saved_tensors
    temperature, ignore_index, chunk, backend = ctx.rest
    needs = list(ctx.needs_input_grad[:3])
    gradients: tuple[Tensor | None, ...] = (None, None, None)
    if by_logprob is not None or by_entropy is not None:
        given = (*tensors, temperature, ignore_index, entropy, statistics, by_logprob, by_entropy)
        made = _linear_logprob_backward(*given, needs, chunk, backend)
        gradients = tuple(gradient if needed else None for gradient, needed in zip(made, needs, strict=True))
    return (*gradients, *[None] * 6)


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


@as_linear
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
    check_values: bool = False,
    backend: str | None = None,
) -> TokenLogprob:
    """Log-prob of each target, and entropy, under softmax((hidden @ weight.T + bias) / temperature), without logits.

    Differentiable in hidden, weight and bias, by both outputs. Forward makes one product; backward makes it again,
    a slice of the vocabulary at a time, and two more. `linear_policy_loss` needs three products where this needs four.
    A row whose upstream gradients are 0 takes no part in backward's, on a CPU, and what it holds reaches no gradient.
    Under autocast hidden, weight and bias are cast as `F.linear` casts them, and gradients come in their own dtypes.

    Args:
        hidden: `[T, H]` float32, float64, bfloat16 or float16.
        weight: `[V, H]` of hidden's dtype: the output layer, a row per token of the vocabulary.
        targets: `[T]` int64, in 0 to V - 1, or `ignore_index`.
        bias: `[V]` floating; -inf masks a token out of the vocabulary.
        temperature: a float, or `[T]` floating, one per row, from 1e-6 to 1e6; not differentiable.
        ignore_index: a target that gives log-prob 0, entropy 0 and gradient 0, whatever the hidden state of its row;
            forward does not compute its row, nor backward on a CPU.
        chunk: how many logits may exist at a time (at least one slice of one row); None for 2^25 on a CPU, 2^27
            elsewhere. The numbers do not depend on it, but for the order in which gradients are summed up.
        group: ranks among which the vocabulary is split, in their order: weight and bias are this rank's rows, V is
            the sum over ranks, and hidden and targets are the same on all. One small all-gather forward, one all-reduce
            of hidden's gradient backward. Not within torch.compile. What one rank refuses all of them raise, naming
            the rank; but on a device without `check_values`, which is not waited for, and where memory runs out, the
            others wait until the group's timeout.
        check_values: check values on a device too, which waits for it; on the CPU they are always checked.
        backend: None for the best available, or `"reference"`, `"cpu"` or `"triton"`.

    Returns:
        `TokenLogprob` of two `[T]` float32, or float64 for float64 hidden, in nats; sums are float32 or wider. On a CPU
        and in Triton (but for float64) a row has the same bits whatever else is in the batch.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that are not allowed; the message says where.
        RuntimeError: the backend asked for cannot run here.

    Source: the slices of a row are put together as Milakov and Gimelshein do (arXiv 1805.02867); making slices again in
    the backward pass is due to Wijmans et al. (arXiv 2411.09009).
    """

    def described() -> tuple[Inputs, int, str]:
        check_shapes(hidden, weight, targets, bias, temperature)
        temperatures, scalar = by_row(temperature)
        chosen = dispatch.backend_for("linear_logprob", hidden, backend)
        given = Inputs(hidden, weight, bias, targets, temperatures, scalar)
        if group is not None:
            check_split(chosen, given)
        return given, chunk_of(chunk, hidden.device.type), chosen

    if group is not None:
        ranks = parallel.ranks_of(group, check_values, hidden)
        given, chunk, chosen = ranks.alike(described)
        return TokenLogprob(*parallel.linear_logprob(given, ignore_index, chunk, ranks, check_values, chosen))
    given, chunk, chosen = described()
    if check_values or (chosen == "reference" and segments.readable(hidden)):
        check_given(given, ignore_index)
        check_logits(given.detached(), targets != ignore_index)
    if chosen == "reference":
        return TokenLogprob(*reference.linear_logprob(*given, ignore_index))
    logprob, entropy, _ = _linear_logprob(*given, ignore_index, chunk, chosen)
    return TokenLogprob(logprob, entropy)
