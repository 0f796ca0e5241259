"""Hidden states, output layer and targets of one call: how they are narrowed to the rows and the slice that count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from v05.kernels import segments
from v05.kernels.token_logprob.softmax import SKIPPED, localised


class Inputs(NamedTuple):
    """hidden `[T, H]`, weight `[V, H]`, bias `[V]`, targets `[T]`, temperatures `[T]` float64 or one for all."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperatures: Tensor | None
    temperature: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits, statistics and sums."""
        return segments.working_dtype(self.weight)

    @property
    def columns(self) -> int:
        """V, the size of the vocabulary, or of this slice of it."""
        return self.weight.shape[0]

    def detached(self) -> Inputs:
        """The same without autograd."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def localised(self, ignore_index: int, start: Tensor | int = 0) -> Inputs:
        """The same with targets counted from the start of this slice, `SKIPPED` where ignored."""
        temperatures = None if self.temperatures is None else self.temperatures.to(torch.float64).contiguous()
        targets = localised(self.targets, self.columns, ignore_index, start)
        return self._replace(targets=targets, temperatures=temperatures)

    def moved_by(self, *upstream: Tensor | None) -> Inputs:
        """The same where rows are skipped whose upstream gradients, `[T]` each, are all 0."""
        targets = torch.full_like(self.targets, SKIPPED)
        for values in upstream:
            targets = targets if values is None else torch.where(values != 0, self.targets, targets)
        return self._replace(targets=targets)

    def counting(self) -> Tensor | None:
        """The rows that count, ascending; None: all, or a device, which is not waited for."""
        kept = self.targets != SKIPPED
        if self.hidden.device.type != "cpu" or bool(kept.all()):
            return None
        return kept.nonzero().squeeze(1)

    def without_skipped(self) -> tuple[Inputs, Tensor | None]:
        """The rows that count and where they were; None: every row is where it was.

        On a device that is so of all rows, and hidden states of those that are skipped are 0.
        """
        rows = self.counting()
        if rows is not None:
            return self.at(rows), rows
        if self.hidden.device.type == "cpu":
            return self._replace(hidden=self.hidden.detach()), None
        return self.zeroed(), None

    def zeroed(self) -> Inputs:
        """The same with hidden states of 0 where a row is skipped."""
        return self._replace(hidden=torch.where((self.targets != SKIPPED)[:, None], self.hidden, 0))

    def at(self, rows: Tensor | slice) -> Inputs:
        """The same for some of the rows."""
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows], temperatures=temperatures)

    def slice_of(self, first: int, last: int) -> Inputs:
        """The same for a slice of the vocabulary, from first up to last."""
        targets = localised(self.targets, last - first, SKIPPED, first)
        bias = None if self.bias is None else self.bias[first:last]
        return self._replace(weight=self.weight[first:last], bias=bias, targets=targets)
