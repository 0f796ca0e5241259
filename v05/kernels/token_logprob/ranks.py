"""Where ranks that hold a vocabulary together meet, and how all of them raise what one of them saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Made = TypeVar("Made")


def check_split(backend: str, *given: NamedTuple) -> None:
    """Raises where the backend is the reference, which knows one process alone, or a tensor has no memory of its own,
    as a DTensor has none: kernels run here without torch's dispatcher, which would refuse it."""
    if backend == "reference":
        raise ValueError("group is given and backend is 'reference'; allowed: no group, or another backend")
    for name, values in (field for fields in given for field in fields._asdict().items()):
        if isinstance(values, Tensor) and values.numel() and not values.data_ptr():
            own = f"{name} is a {type(values).__name__}, which has no memory of its own"
            raise TypeError(f"{own}; allowed with a group: this rank's own part of it, such as to_local() returns")


class Ranks:
    """The ranks of one call, and the error that this one has seen.

    `inputs` names what is given, `first` being the first of it, and `same` what of it has to be the same on all ranks.
    `heeds` says, the same on all ranks, whether what others saw is read where they meet: on the CPU, and on a device
    where values are checked, which waits for it. Ranks meet for the numbers alone; an error goes along with those.
    """

    def __init__(
        self, group: dist.ProcessGroup, check_values: bool, first: object, inputs: str, same: tuple[str, ...]
    ) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.inputs, self.same = inputs, same
        self.device = first.device if isinstance(first, Tensor) else torch.device("cpu")
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
                self.sizes(0, *[0] * len(self.same))
            raise

    def sizes(self, columns: int, *same: int) -> Tensor:
        """The columns of every rank, `[ranks]`; in one meeting, the others are found to be the same on all."""
        if not self.heeds:
            return self.gather(torch.full((1,), columns, device=self.device))[:, 0]
        table = self.gather(torch.tensor([columns, *same], device=self.device))
        for name, given in zip(self.same, table[:, 1:].t().tolist(), strict=True):
            if len(set(given)) > 1:
                raise ValueError(f"{name} of {self.inputs} are {given} on the ranks; allowed: the same on all")
        return table[:, 0]

    def gather(self, values: Tensor) -> Tensor:
        """The values of every rank, `[ranks, ...]`."""
        own = values.flatten()
        if self.heeds:
            own = torch.cat([own, own.new_full((1,), self.error is not None)])
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(every, own, self.group)
        table = torch.stack(every)
        if self.heeds:
            self._raise_if(bool(table[:, -1].any()))
            table = table[:, :-1]
        return table.view(len(every), *values.shape)

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
