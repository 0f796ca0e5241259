"""How long one call takes: replay of a CUDA graph, or CUDA events, on a GPU; the wall clock on a CPU."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]
REPLAYED = 16  # calls in a graph, so that one replay is long beside the resolution of an event
REPLAY_MS = 4.0  # or fewer, where they take this long
LONG_MS = 20.0  # a call from which on no graph is made
MOST_INPUTS = 64  # sets of inputs that a GPU goes through in turn
HOST_CALLS = 20
HOST_MS = 50.0  # that these may take; one call always does


@dataclass(frozen=True)
class Clock:
    """Times a contender: `tick` does `calls` calls; `how` is "graph", "events" or "wall clock".

    `runs` are held because a graph reads their inputs where they lay when it was captured.
    """

    tick: Callable[[], object]
    calls: int
    how: str
    runs: Sequence[Run]

    def milliseconds(self) -> float:
        """Milliseconds a call, from one tick."""
        if self.how == "wall clock":
            begin = time.perf_counter()
            self.tick()
            return (time.perf_counter() - begin) * 1e3 / self.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.tick()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def synchronise(device: torch.device) -> None:
    """Waits for a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def inputs_needed(size: int, device: torch.device) -> int:
    """How many sets of inputs of `size` bytes fill the second-level cache of a GPU twice; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_INPUTS, -(-2 * cache // max(size, 1))))


def captured(runs: Sequence[Run]) -> torch.cuda.CUDAGraph | None:
    """A graph that calls each run once, in order; None where a call cannot be captured, as one that waits cannot."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for run in runs:
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for run in runs:
                run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def clock_of(runs: Sequence[Run], device: torch.device, graph: bool = False) -> Clock:
    """The clock of a contender that does the same work on each of several inputs, which it goes through in turn."""
    if device.type != "cuda":
        return Clock(runs[0], 1, "wall clock", runs)
    turn = itertools.cycle(runs)
    by_events = Clock(lambda: next(turn)(), 1, "events", runs)
    if not graph or by_events.milliseconds() > LONG_MS:
        return by_events
    took = by_events.milliseconds()
    wanted = min(REPLAYED, int(REPLAY_MS / took) + 1)
    repeated = list(runs) * -(-wanted // len(runs))
    replayed = captured(repeated)
    return by_events if replayed is None else Clock(replayed.replay, len(repeated), "graph", runs)


def host_microseconds(run: Run, device: torch.device) -> float | None:
    """Microseconds that the host is busy with one call on a GPU, while the device still works; None on a CPU."""
    if device.type != "cuda":
        return None
    times: list[float] = []
    calls = 1
    for _ in range(4):
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - begin) * 1e6 / calls)
        calls = min(HOST_CALLS, int(HOST_MS * 1e3 / times[-1]))
        if not calls:
            break
    synchronise(device)
    return min(times)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a call needs on top of what is held before it, outputs included; None where this is not measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the largest resident size so far
        before = _resident("VmRSS:")
        run()
        return max(0, _resident("VmHWM:") - before)
    except (OSError, AttributeError):
        return None


class Bystanders:
    """Counts the cores that other processes use while it is entered; `cores` is None where the system does not say."""

    def _seconds(self) -> tuple[float, float, float]:
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()

    def __enter__(self) -> Bystanders:
        self.cores: float | None = None
        self._before = self._seconds() if Path("/proc/stat").exists() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            wall, busy, own = (after - before for after, before in zip(self._seconds(), self._before, strict=True))
            self.cores = max(0.0, (busy - own) / wall)
