"""linear_logprob with the vocabulary split among the ranks of a `torch.distributed` group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch
from v05.kernels.custom import once
from v05.kernels.linear_logprob.inputs import Inputs
from v05.kernels.linear_logprob.passes import Gradients, Needs
from v05.kernels.linear_logprob.rules import check_logits
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.rules import check_targets
from v05.kernels.token_logprob.softmax import Softmax

SAME = ("rows", "features", "rows that count")


def ranks_of(group: dist.ProcessGroup, check_values: bool, hidden: object) -> Ranks:
    """The ranks of one call."""
    return Ranks(group, check_values, hidden, "hidden and targets", SAME)


def localised(
    given: Inputs, kept: Tensor, ignore_index: int, but: str, ranks: Ranks, check_values: bool
) -> tuple[Inputs, Tensor]:
    """The same with targets counted from this rank's first token, and the size of the widest slice, not waited for.

    Values are checked on the CPU and where asked for; an error is kept back until ranks meet next.
    """
    same = (len(kept), given.hidden.shape[1], int(kept.sum())) if ranks.heeds else ()
    sizes = ranks.sizes(given.columns, *same)
    if ranks.heeds:
        with ranks.holding():
            check_targets(given.targets, given.temperatures, int(sizes.sum()), kept, but)
            if check_values:
                check_logits(given, kept)
    return given.localised(ignore_index, sizes[: ranks.rank].sum()), sizes.max()


def reduced(made: Gradients, given: Inputs, ranks: Ranks) -> tuple[Tensor | None, ...]:
    """Gradients in the dtypes of their inputs, hidden's summed up over the ranks."""
    if made.hidden is not None:
        ranks.add(made.hidden)
    likes = zip(made, given[:3], strict=True)
    return tuple(None if gradient is None else gradient.to(like.dtype) for gradient, like in likes)  # type: ignore[union-attr]


class _LinearLogprob(torch.autograd.Function):
    """Log-prob and entropy of the ranks' slices together."""

    @staticmethod
    def forward(
        ctx: Any, given: Inputs, chunk: int, ranks: Ranks, backend: str, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        run = dispatch.implementation("linear_logprob", backend)
        softmax = run.forward(given, chunk, ranks)
        ctx.save_for_backward(*given[:5], softmax.entropy, softmax.largest, softmax.log_sum)
        ctx.rest = given.temperature, chunk, ranks, run
        ctx.set_materialize_grads(False)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once("linear_logprob")
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperatures, entropy, largest, log_sum = ctx.saved_tensors
        temperature, chunk, ranks, run = ctx.rest
        given = Inputs(hidden, weight, bias, targets, temperatures, temperature)
        softmax = Softmax(entropy, entropy, largest, log_sum)
        upstream = [None if values is None else values.contiguous() for values in (by_logprob, by_entropy)]
        made = run.backward(given, softmax, *upstream, Needs(*ctx.needs_input_grad[4:]), chunk)
        return (None, None, None, None, *reduced(made, given, ranks))


def linear_logprob(
    given: Inputs, ignore_index: int, chunk: int, ranks: Ranks, check_values: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The public function, where a group is given."""
    kept, but = given.targets != ignore_index, f", or ignore_index {ignore_index}"
    local, _ = localised(given.detached(), kept, ignore_index, but, ranks, check_values)
    return _LinearLogprob.apply(local, chunk, ranks, backend, *given[:3])
