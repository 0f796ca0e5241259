"""token_logprob with the vocabulary split between two processes, beside what a trainer would write, and torch's own."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks.harness import OURS, Case, Contender
from benchmarks.rivals import forward_backward, without_gradient
from benchmarks.timing import Run
from v05.kernels import token_logprob

RANKS = 2
FULL = [(2048, 32000, torch.float32), (2048, 32000, torch.bfloat16)]
TINY = (16, 1024, torch.float32)
Spec = tuple[int, int, torch.dtype, bool]


class Eager(torch.autograd.Function):
    """Log-prob and entropy of split logits as trainers write them: softmax in float32, a reduction for each sum."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
        wide = logits.float()
        largest = wide.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        wide = wide - largest[:, None]
        place = targets - first
        inside = (place >= 0) & (place < logits.shape[1])
        chosen = torch.where(inside, wide.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1), 0)
        dist.all_reduce(chosen)
        power = wide.exp()
        total = power.sum(1)
        dist.all_reduce(total)
        share = power / total[:, None]
        mean = (share * wide).sum(1)
        dist.all_reduce(mean)
        entropy = total.log() - mean
        ctx.save_for_backward(logits, share, wide - total.log()[:, None], entropy, place, inside)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, by_logprob: Tensor, by_entropy: Tensor) -> tuple[Tensor, None, None]:
        logits, share, log_share, entropy, place, inside = ctx.saved_tensors
        gradient = -share * (by_logprob[:, None] + by_entropy[:, None] * (log_share + entropy[:, None]))
        rows = inside.nonzero().squeeze(1)
        gradient[rows, place[rows]] += by_logprob[rows]
        return gradient.to(logits.dtype), None, None


def runs_of(rank: int, spec: Spec) -> dict[str, Run]:
    """What each contender calls on this rank."""
    rows, columns, dtype, backward = spec
    rng = torch.Generator().manual_seed(0)
    first, width = rank * columns // RANKS, columns // RANKS
    logits = (torch.randn(rows, columns, generator=rng) * 3).to(dtype)[:, first : first + width].contiguous()
    targets = torch.randint(columns, (rows,), generator=rng)
    upstream = [torch.randn(rows, generator=rng) for _ in range(2)]
    mesh = init_device_mesh("cpu", (RANKS,))

    def timed(both: Callable[[Tensor], Sequence[Tensor]]) -> Run:
        return forward_backward(both, logits, upstream) if backward else without_gradient(lambda: both(logits))

    def parallel_loss() -> Sequence[Tensor]:
        with loss_parallel(), torch.no_grad():
            split = DTensor.from_local(logits, mesh, [Shard(1)], run_check=False)
            return (-F.cross_entropy(split, targets, reduction="none").full_tensor().float(),)

    runs = {
        OURS: timed(lambda x: token_logprob(x, targets, group=dist.group.WORLD)),
        "torch eager": timed(lambda x: Eager.apply(x, targets, first)),
    }
    return runs if backward else runs | {"torch loss_parallel": parallel_loss}


def join(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)


def follow(line: Connection, store: str, threads: int) -> None:
    """The other rank: takes a case, then calls what it is told to; None ends it."""
    torch.set_num_threads(threads)
    join(1, store)
    runs: dict[str, Run] = {}
    while (told := line.recv()) is not None:
        if isinstance(told, str):
            runs[told]()
        else:
            runs = runs_of(1, told)


@cache
def companion() -> Connection:
    """The line to a second process, which has joined this one in a group."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    store = str(Path(tempfile.mkdtemp()) / "store")
    process = context.Process(target=follow, args=(theirs, store, torch.get_num_threads()), daemon=True)
    process.start()
    join(0, store)

    def part() -> None:
        ours.send(None)
        process.join()
        dist.destroy_process_group()

    atexit.register(part)
    return ours


def case(spec: Spec) -> Case:
    rows, columns, dtype, backward = spec
    line = companion()
    line.send(spec)
    runs = runs_of(0, spec)

    def together(name: str) -> Run:
        def run() -> Sequence[Tensor]:
            line.send(name)
            return runs[name]()

        return run

    contenders = [Contender(name, together(name)) for name in runs]
    if backward:
        contenders.append(Contender("torch loss_parallel", None, "has no entropy, so another gradient"))
    contenders.append(Contender("Megatron", None, "not measured: nothing here calls it"))
    elements = rows * columns // RANKS
    return Case(
        op="split_vocabulary",
        shape=f"{rows} x {columns} on {RANKS} ranks",
        dtype=str(dtype).removeprefix("torch."),
        direction="forward + backward" if backward else "forward",
        bytes=elements * dtype.itemsize * (3 if backward else 1) + rows * 16,
        flops=elements * (14 if backward else 6),
        contenders=contenders,
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        elements=elements,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Yields the cases, one in memory at a time; none on a GPU, of which ranks have one each."""
    for rows, columns, dtype in ([] if quick or device.type != "cpu" else FULL) + [TINY] * (device.type == "cpu"):
        for backward in (False, True):
            yield case((rows, columns, dtype, backward))
