"""The processes that train one policy together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE: Final = timedelta(days=1)  # that followers wait for the leader, which may sample for long


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Attributes:
        rank: of this process, 0 to `count - 1`; 0 leads: it samples, judges, decides and writes.
        count: processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this process is the one that decides and writes."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the leader's value; what the others give is ignored."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def combine(self, numbers: Mapping[str, float], largest: tuple[str, ...] = ()) -> dict[str, float]:
        """Return the sums over all processes by name, or the maxima of the names in `largest`."""
        parts = self.gather(dict(numbers))
        return {name: (max if name in largest else sum)(part[name] for part in parts) for name in numbers}


ALONE: Final = Ranks()


def join_ranks() -> Ranks:
    """Join the processes that torchrun started, or be alone where it did not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return Ranks(dist.get_rank(), count)


def leave_ranks() -> None:
    """Leave the processes that `join_ranks` joined, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()
