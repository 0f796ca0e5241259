"""What a slice of the vocabulary knows of a softmax, and how ranks put theirs together, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from v05.kernels.token_logprob.ranks import Ranks

INFINITY = float("inf")
SKIPPED, ELSEWHERE = -100, -1  # a target that is not computed, and one in another slice of the vocabulary
SKIPPED_ROW = {"logprob": 0.0, "entropy": 0.0, "largest": -INFINITY, "log_sum": 0.0}


class Rows(Protocol):
    """What of a slice's rows is needed here: targets as `localised` leaves them, and by what logits are divided."""

    @property
    def targets(self) -> Tensor:
        """`[T]`, counted from the slice's first token."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of statistics."""

    @property
    def temperatures(self) -> Tensor | None:
        """`[T]` float64, or None: one for all."""

    @property
    def temperature(self) -> float:
        """The one for all."""


def inverse_temperature(rows: Rows) -> Tensor | float:
    """1 / temperature in float64, `[T]` or one for all."""
    return 1 / rows.temperature if rows.temperatures is None else 1 / rows.temperatures


def localised(targets: Tensor, columns: int, ignore_index: int, start: Tensor | int = 0) -> Tensor:
    """Targets counted from the start of a slice: `ELSEWHERE` where they are in another, `SKIPPED` where ignored."""
    own = targets - start
    own = torch.where((own >= 0) & (own < columns), own, ELSEWHERE)
    return torch.where(targets == ignore_index, SKIPPED, own).contiguous()


class Partial(NamedTuple):
    """Of one slice, `[T]` each: the largest logit, the log of the sum of exp((logit - largest) / temperature), the
    entropy of the slice's own distribution, and the target's logit, 0 where that lies elsewhere."""

    largest: Tensor
    log_sum: Tensor
    entropy: Tensor
    target: Tensor


def partial_of(run: Callable[..., tuple[Tensor, Tensor, Tensor]], logits: Tensor, given: Rows) -> Partial:
    """What a slice of logits knows of its rows, by a backend's `token_logprob`."""
    asked = torch.where(given.targets == ELSEWHERE, 0, given.targets)  # log-probs of tokens elsewhere are not used
    _, entropy, statistics = run(logits, asked, given.temperatures, given.temperature, SKIPPED)
    target = logits.gather(1, given.targets.clamp(min=0)[:, None]).squeeze(1)
    return Partial(statistics[0], statistics[1], entropy, torch.where(given.targets >= 0, target, 0))


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


def _finish(given: Rows, gap: Tensor, entropy: Tensor, largest: Tensor, log_sum: Tensor) -> Softmax:
    """The softmax from (target - base) / temperature, and the rest; what a skipped row is takes no part in it."""
    kept = given.targets != SKIPPED
    fields = {"logprob": gap - log_sum, "entropy": entropy, "largest": largest, "log_sum": log_sum}
    filled = {name: torch.where(kept, field, SKIPPED_ROW[name]) for name, field in fields.items()}
    return Softmax(**{name: field.to(given.wide) for name, field in filled.items()})


def finish(given: Rows, part: Partial, ranks: Ranks | None = None) -> Softmax:
    """The softmax of the whole vocabulary from what this process, or each rank of a group, knows of its slice.

    In a group every rank gets what all know, in one meeting, and works out the same. The entropy of slices together is
    sum_b w_b (H_b - log w_b), in which no term is negative.
    """
    inverse, found = inverse_temperature(given), given.targets >= 0
    if ranks is None:
        largest = part.largest.double()
        base = torch.where(largest > -INFINITY, largest, 0)
        gap = torch.where(found, (part.target.double() - base) * inverse, float("nan"))
        return _finish(given, gap, part.entropy, largest, part.log_sum)
    every = ranks.gather(torch.stack([field.double() for field in (*part, found)]))
    tops, log_sums, entropies, targets, found_by = every.unbind(1)  # [ranks, T] each
    largest = tops.amax(0)
    base = torch.where(largest > -INFINITY, largest, 0)
    share = (tops - base) * inverse + log_sums
    size = share.exp()
    weighted = torch.where(size > 0, size * (entropies - torch.where(size > 0, share, 0)), 0)
    empty, total = largest == -INFINITY, size.sum(0)  # empty: every logit is -inf
    log_sum = torch.where(empty, 0, total.log())
    entropy = torch.where(empty, 0, (weighted.sum(0) / total + log_sum).clamp(min=0))
    gap = torch.where(found_by > 0, (targets - base) * inverse, 0).sum(0)
    return _finish(given, torch.where(found_by.sum(0) > 0, gap, float("nan")), entropy, largest, log_sum)
