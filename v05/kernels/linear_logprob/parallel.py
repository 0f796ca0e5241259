"""linear_logprob with the vocabulary split among the ranks of a `torch.distributed` group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.passes import Gradients, Needs
from v05.kernels.linear_logprob.rules import check_logits, check_targets
from v05.kernels.linear_logprob.softmax import Softmax


def bounds(given: Inputs, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The first token of this rank's slice and the size of the whole vocabulary, on the device, not waited for."""
    own = torch.full((1,), given.columns, device=given.hidden.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group)
    every = torch.cat(sizes)
    return every[: dist.get_rank(group)].sum(), every.sum()


def agreed_chunk(columns: int, chunk: int, like: Tensor, group: dist.ProcessGroup) -> int:
    """As many logits of this rank's slice as make the rows that the widest slice allows; waits for the device."""
    widest = torch.full((1,), columns, device=like.device)
    dist.all_reduce(widest, dist.ReduceOp.MAX, group)
    return max(1, chunk // int(widest)) * columns


def localised(
    given: Inputs, kept: Tensor, ignore_index: int, but: str, group: dist.ProcessGroup, check_values: bool
) -> Inputs:
    """The same with targets counted from this rank's first token; values are checked on the CPU and where asked for."""
    start, total = bounds(given, group)
    if check_values or given.hidden.device.type == "cpu":
        check_targets(given.targets, given.temperatures, int(total), kept, but)
    if check_values:
        check_logits(given, kept)
    return given.localised(ignore_index, start)


def reduced(made: Gradients, given: Inputs, group: dist.ProcessGroup) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of their inputs, hidden's summed up over the ranks."""
    if made.hidden is not None:
        dist.all_reduce(made.hidden, dist.ReduceOp.SUM, group)
    likes = zip(made, given[:3], strict=True)
    return tuple(None if gradient is None else gradient.to(like.dtype) for gradient, like in likes)  # type: ignore[union-attr]


class _LinearLogprob(torch.autograd.Function):
    """Log-prob and entropy of the ranks' slices together."""

    @staticmethod
    def forward(
        ctx: Any, given: Inputs, chunk: int, group: dist.ProcessGroup, backend: str, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        run = dispatch.implementation("linear_logprob", backend)
        softmax = run.forward(given, chunk, group)
        ctx.save_for_backward(*given[:5], softmax.entropy, softmax.largest, softmax.log_sum)
        ctx.rest = given.temperature, chunk, group, run
        ctx.set_materialize_grads(False)
        return softmax.logprob, softmax.entropy

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperatures, entropy, largest, log_sum = ctx.saved_tensors
        temperature, chunk, group, run = ctx.rest
        given = Inputs(hidden, weight, bias, targets, temperatures, temperature)
        softmax = Softmax(entropy, entropy, largest, log_sum)
        upstream = [None if values is None else values.contiguous() for values in (by_logprob, by_entropy)]
        made = run.backward(given, softmax, *upstream, Needs(*ctx.needs_input_grad[4:]), chunk)
        return (None, None, None, None, *reduced(made, given, group))


def linear_logprob(
    given: Inputs, ignore_index: int, chunk: int, group: dist.ProcessGroup, check_values: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The public function, where a group is given.

    Raises:
        ValueError: the backend is the reference, which knows one process alone.
    """
    if backend == "reference":
        raise ValueError("group is given and backend is 'reference'; allowed: no group, or another backend")
    but = f", or ignore_index {ignore_index}"
    local = localised(given.detached(), given.targets != ignore_index, ignore_index, but, group, check_values)
    return _LinearLogprob.apply(local, chunk, group, backend, *given[:3])
