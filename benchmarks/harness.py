"""Times rivals side by side: every round runs each of them once, the next round in the opposite order."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

OURS = "v05"
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` returns the tensors it computed, or is None where `why_missing` says why."""

    name: str
    run: Run | None
    why_missing: str = ""


@dataclass(frozen=True)
class Case:
    """One op on one input. `bytes` and `flops` are what any implementation must move and compute, exp counting as one.

    `tolerance` is the largest difference between a rival's tensors and ours, relative to max(1, |value|), at which they
    count as having done the same work.
    """

    op: str
    shape: str
    dtype: str
    direction: str
    bytes: int
    flops: int
    contenders: list[Contender]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tolerance: float = 1e-3


class Row(NamedTuple):
    """One line of results.csv.

    `direction` is the pass (column `pass`). `fraction_of_ceiling`: the time that a copy of as many bytes takes, over
    the time taken. `ratio_to_ours`: the median over the rounds of the contender's time over ours, so above 1 where ours
    is faster. `peak_mib`: memory needed on top of the inputs, outputs included. `other_load`: how many cores other
    processes used while this was timed; far from 0, the times are unreliable.
    """

    run: str
    op: str
    shape: str
    dtype: str
    direction: str
    contender: str
    p20_ms: str
    p50_ms: str
    p80_ms: str
    bytes: int
    flops: int
    fraction_of_ceiling: str
    ratio_to_ours: str
    peak_mib: str
    device: str
    threads: int
    other_load: str
    versions: str
    commit: str
    note: str


@cache
def device_name(device: torch.device) -> str:
    """The model of the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability})"


@cache
def commit() -> str:
    """The commit measured, with `+` where the tree has changes."""
    try:
        folder = Path(__file__).parent
        command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def rival(name: str, modules: str, make: Callable[..., Run]) -> Contender:
    """A contender from other packages: `make` gets the named modules; where one is absent, that is its row."""
    try:
        return Contender(name, make(*[importlib.import_module(module) for module in modules.split()]))
    except (ImportError, AttributeError) as error:
        return Contender(name, None, f"not here: {error}".splitlines()[0])


def compiled(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """torch.compile of a function for this shape alone."""
    return torch.compile(function, dynamic=False)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(run: Run, device: torch.device) -> float:
    """Milliseconds that one call takes: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


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


def copier(size: int, device: torch.device) -> Run:
    """The ceiling: a copy that reads and writes `size` bytes together."""
    source = torch.ones(max(1, size // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |actual - expected| / max(1, |expected|) over all tensors."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        parts = (values.detach().flatten().split(2**26) for values in (a, b))  # in float64 the whole may not fit
        for x, y in zip(*parts, strict=True):
            if x.numel():
                worst = max(worst, float(((x.double() - y.double()).abs() / y.abs().double().clamp(min=1)).max()))
    return worst


def warm_up(case: Case) -> tuple[dict[str, Run], dict[str, str]]:
    """Runs each contender, ours first: those that work, and a note on each that does not or computes something else."""
    runs: dict[str, Run] = {}
    notes: dict[str, str] = {}
    expected: Sequence[Tensor] = ()
    for contender in case.contenders:
        name, notes[contender.name] = contender.name, contender.why_missing
        if contender.run is None:
            continue
        try:
            result = contender.run()
            if name != OURS and (error := difference(result, expected)) > case.tolerance:
                notes[name] = f"differs from v05 by {error:.1g}"
            elif name == OURS:
                expected = [tensor.detach().clone() for tensor in result]
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"failed: {error}".splitlines()[0][:120]
            continue
        runs[name] = contender.run
    return runs, notes


def interleaved(runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Times of every run, round after round in alternating order, for about that many seconds.

    What takes longer in one call than all the rounds may is timed by that call alone.
    """
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        synchronise(device)
        times[name] = [time_ms(run, device)]
    order = [name for name in runs if times[name][0] < seconds * 333 or name == OURS]
    once = sum(times[name][0] for name in order)
    rounds = int(min(400, max(5, seconds * 1e3 / max(once, 1e-3))))
    for name in order:
        times[name] = []
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            synchronise(device)
            times[name].append(time_ms(runs[name], device))
    return times


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


def percentiles(times: list[float]) -> tuple[str, str, str]:
    """p20, p50 and p80 in milliseconds."""
    times = times * 2 if len(times) == 1 else times
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return tuple(f"{cut:.4g}" for cut in (cuts[1], cuts[4], cuts[7]))  # type: ignore[return-value]


def measure(case: Case, run_id: str, seconds: float) -> Iterator[Row]:
    """Warms up, times and describes every contender of a case, the missing ones too."""
    runs, notes = warm_up(case)
    with Bystanders() as others:
        times = interleaved(runs | {"": copier(case.bytes, case.device)}, case.device, seconds)
    copy = statistics.median(times[""])
    for contender in case.contenders:
        name = contender.name
        p20 = p50 = p80 = ceiling = ratio = peak = ""
        if name in runs:
            p20, p50, p80 = percentiles(times[name])
            ceiling = f"{copy / statistics.median(times[name]):.3g}"
            if len(times[name]) == 1:
                ratio = f"{times[name][0] / statistics.median(times[OURS]):.3g}"
                notes[name] = "; ".join(filter(None, [notes[name], "one call"]))
            else:
                ratio = f"{statistics.median(a / b for a, b in zip(times[name], times[OURS], strict=True)):.3g}"
            used = peak_memory(runs[name], case.device)
            peak = "" if used is None else f"{used / 2**20:.1f}"
        yield Row(
            run_id,
            case.op,
            case.shape,
            case.dtype,
            case.direction,
            name,
            p20,
            p50,
            p80,
            case.bytes,
            case.flops,
            ceiling,
            ratio,
            peak,
            device_name(case.device),
            torch.get_num_threads(),
            "" if others.cores is None else f"{others.cores:.2f}",
            f"python {platform.python_version()}, torch {torch.__version__}",
            commit(),
            notes[name],
        )
