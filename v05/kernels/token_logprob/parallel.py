"""token_logprob with the columns of the logits split among the ranks of a `torch.distributed` group."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels import dispatch, segments
from v05.kernels.custom import once
from v05.kernels.token_logprob.backward import gradient_of
from v05.kernels.token_logprob.ranks import Ranks
from v05.kernels.token_logprob.rules import check_targets, check_values
from v05.kernels.token_logprob.softmax import ELSEWHERE, SKIPPED, Partial, Softmax, finish, localised, partial_of

SAME = ("rows", "rows that count")


class Rows(NamedTuple):
    """logits `[T, V]` of this rank's slice, targets `[T]`, temperatures `[T]` float64 or one for all."""

    logits: Tensor
    targets: Tensor
    temperatures: Tensor | None
    temperature: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics."""
        return segments.working_dtype(self.logits)


def ranks_of(group: dist.ProcessGroup, check_values: bool, logits: object) -> Ranks:
    """The ranks of one call."""
    return Ranks(group, check_values, logits, "logits and targets", SAME)


class _TokenLogprob(torch.autograd.Function):
    """Log-prob and entropy of the ranks' slices together."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, softmax: Softmax, rows: Rows, inplace: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, rows.targets, rows.temperatures, softmax.entropy, softmax.statistics)
        ctx.rest = rows.temperature, inplace, backend
        ctx.set_materialize_grads(False)
        return softmax.logprob, softmax.entropy

    @staticmethod
    @once("token_logprob")
    def backward(ctx: Any, by_logprob: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, temperatures, entropy, statistics = ctx.saved_tensors
        temperature, inplace, backend = ctx.rest
        if by_logprob is None and by_entropy is None:
            return (None,) * 5
        given = (targets, temperatures, temperature, SKIPPED, entropy, statistics, by_logprob, by_entropy, backend)
        return gradient_of(logits, inplace, *given), *(None,) * 4


def token_logprob(
    rows: Rows, ignore_index: int, inplace: bool, ranks: Ranks, checks: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The public function, where a group is given."""
    kept = rows.targets != ignore_index
    same = (len(kept), int(kept.sum())) if ranks.heeds else ()
    columns = rows.logits.shape[1]
    sizes = ranks.sizes(columns, *same)
    targets = localised(rows.targets, columns, ignore_index, sizes[: ranks.rank].sum())
    temperatures = None if rows.temperatures is None else rows.temperatures.to(torch.float64).contiguous()
    local = Rows(rows.logits.detach(), targets, temperatures, rows.temperature)
    part = Partial(*torch.zeros(4, len(kept), dtype=rows.wide, device=ranks.device))  # where an error is on its way
    with ranks.holding():
        if ranks.heeds:
            check_targets(rows.targets, rows.temperatures, int(sizes.sum()), kept, f", or ignore_index {ignore_index}")
        if checks and ranks.device.type != "cpu":
            check_values(local.logits, torch.where(targets == ELSEWHERE, 0, targets), rows.temperatures, SKIPPED)
        run = dispatch.implementation("token_logprob", backend).token_logprob  # on the CPU it raises at a bad logit
        part = partial_of(run, local.logits, local)
    softmax = finish(local, part, ranks)
    return _TokenLogprob.apply(rows.logits, softmax, local, inplace, backend)
