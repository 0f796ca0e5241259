"""What slices of a vocabulary know of a softmax, and how slices and ranks are put together, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from v05.kernels.linear_logprob.inputs import SKIPPED, Inputs

INFINITY = float("inf")
SKIPPED_ROW = {"logprob": 0.0, "entropy": 0.0, "largest": -INFINITY, "log_sum": 0.0}


class Partial(NamedTuple):
    """Of one slice, `[T]` each: the largest logit, the log of the sum of exp((logit - largest) / temperature), the
    entropy of the slice's own distribution, and the target's logit, 0 where that lies elsewhere."""

    largest: Tensor
    log_sum: Tensor
    entropy: Tensor
    target: Tensor


class Softmax(NamedTuple):
    """Of the whole vocabulary, `[T]` each: log-prob of the target, entropy, largest logit and log of the sum."""

    logprob: Tensor
    entropy: Tensor
    largest: Tensor
    log_sum: Tensor

    @property
    def statistics(self) -> Tensor:
        """Largest logits and logs of sums, `[2, T]`."""
        return torch.stack([self.largest, self.log_sum])


def _shares(parts: Partial, base: Tensor, inverse: Tensor | float) -> tuple[Tensor, Tensor]:
    """Each slice's sum relative to the base, and that times (its entropy - log of the share)."""
    share = (parts.largest.double() - base) * inverse + parts.log_sum.double()
    size = share.exp()
    weighted = torch.where(size > 0, size * (parts.entropy.double() - torch.where(size > 0, share, 0)), 0)
    return size, weighted


def _finish(given: Inputs, largest: Tensor, sums: Tensor) -> Softmax:
    """The softmax from sums `[4, T]`: of shares, of weighted entropies, of (target - base) / temperature where found.

    The entropy of a mixture without overlap is sum_b w_b (H_b - log w_b), in which every term is at least 0.
    """
    total, weighted, gap, found = sums
    gap = torch.where(found > 0, gap, float("nan"))  # a target that is in no slice
    kept = given.targets != SKIPPED
    empty = largest == -INFINITY  # every logit is -inf
    log_sum = torch.where(empty, 0, total.log())
    entropy = torch.where(empty, 0, (weighted / total + log_sum).clamp(min=0))
    fields = {"logprob": gap - log_sum, "entropy": entropy, "largest": largest, "log_sum": log_sum}
    filled = {name: torch.where(kept, field, SKIPPED_ROW[name]) for name, field in fields.items()}
    return Softmax(**{name: field.to(given.wide) for name, field in filled.items()})


def join(given: Inputs, slices: Sequence[Partial], group: dist.ProcessGroup | None = None) -> Softmax:
    """Puts slices together, in their order, then the ranks of a group: one all-reduce of maxima and one of sums."""
    parts = Partial(*(torch.stack(field) for field in zip(*slices, strict=True)))
    largest = parts.largest.amax(0).double()
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    base = torch.where(largest > -INFINITY, largest, 0)
    inverse = given.inverse_temperature()
    size, weighted = _shares(parts, base, inverse)
    found = given.targets >= 0
    gap = torch.where(found, (parts.target.sum(0).double() - base) * inverse, 0)
    sums = torch.stack([size.sum(0), weighted.sum(0), gap, found.to(gap.dtype)])
    if group is not None:
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return _finish(given, largest, sums)
