"""Where ranks that hold a vocabulary together meet, and how all of them raise what one of them saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")
SAME = ("rows", "features", "rows that count")  # what of the inputs has to be the same on all ranks


class Ranks:
    """The ranks of one call, and the error that this one has seen.

    `heeds` says, the same on all ranks, whether what others saw is read where they meet: on the CPU, and on a device
    where values are checked, which waits for it. Ranks meet for the numbers alone; an error goes along with those.
    """

    def __init__(self, group: dist.ProcessGroup, check_values: bool, hidden: object) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.device = hidden.device if isinstance(hidden, Tensor) else torch.device("cpu")
        self.heeds = check_values or self.device.type == "cpu"
        self.error: Exception | None = None

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keeps an error back until ranks meet, where others would wait for this one."""
        try:
            yield
        except Exception as error:
            if not self.heeds:
                raise
            self.error = error

    def alike(self, make: Callable[[], Made]) -> Made:
        """What make returns on every rank, before they have met; where it raises on one, it does on all."""
        try:
            return make()
        except Exception as error:
            if self.heeds:
                self.error = error
                self.sizes(0, *[0] * len(SAME))
            raise

    def sizes(self, columns: int, *same: int) -> Tensor:
        """The columns of every rank, `[ranks]`; in one meeting, the others are found to be the same on all."""
        own = torch.full((1,), columns, device=self.device)
        if self.heeds:
            own = torch.tensor([columns, *same, int(self.error is not None)], device=self.device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, own, self.group)
        table = torch.stack(every)
        if self.heeds:
            self._raise_if(bool(table[:, -1].any()))
            for name, given in zip(SAME, table[:, 1:-1].t().tolist(), strict=True):
                if len(set(given)) > 1:
                    raise ValueError(f"{name} of hidden and targets are {given} on the ranks; allowed: the same on all")
        return table[:, 0]

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each value `[T]` over the ranks."""
        values = torch.cat([values, values.new_tensor([self.error is not None])]) if self.heeds else values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        if self.heeds:
            self._raise_if(bool(values[-1]))
            values = values[:-1]
        return values

    def add(self, values: Tensor) -> None:
        """Sums values up over the ranks, in their place."""
        dist.all_reduce(values, dist.ReduceOp.SUM, self.group)

    def firsts(self, chosen: Tensor) -> Tensor:
        """What the first rank has chosen, `[T]` bool: others may have drawn something else."""
        same = chosen.to(torch.uint8)
        dist.broadcast(same, dist.get_global_rank(self.group, 0), self.group)
        return same.bool()

    def _raise_if(self, seen: bool) -> None:
        """Raises on all ranks, which know alike that one has seen an error, and name it."""
        if not seen:
            return
        errors: list[Exception | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(errors, self.error, self.group)
        known = {rank: error for rank, error in enumerate(errors) if error is not None}
        first, texts = next(iter(known.values())), [str(error) for error in known.values()]
        if len(known) == len(errors) and len(set(texts)) == 1:
            raise first
        raise type(first)("; ".join(f"rank {rank}: {text}" for rank, text in zip(known, texts, strict=True)))
