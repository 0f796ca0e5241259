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

    def without_skipped(self) -> tuple[Inputs, Tensor | None]:
        """The rows that count and where they were, on the CPU; on a device all rows, with 0 for skipped hidden states.

        A device is not waited for, so there the number of rows stays. None: every row is where it was.
        """
        kept = self.targets != SKIPPED
        if self.hidden.device.type != "cpu":
            return self._replace(hidden=torch.where(kept[:, None], self.hidden, 0)), None
        if bool(kept.all()):
            return self._replace(hidden=self.hidden.detach()), None
        rows = kept.nonzero().squeeze(1)
        return self.at(rows), rows

    def at(self, rows: Tensor | slice) -> Inputs:
        """The same for some of the rows."""
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows], temperatures=temperatures)

    def slice_of(self, first: int, last: int) -> Inputs:
        """The same for a slice of the vocabulary, from first up to last."""
        targets = localised(self.targets, last - first, SKIPPED, first)
        bias = None if self.bias is None else self.bias[first:last]
        return self._replace(weight=self.weight[first:last], bias=bias, targets=targets)
