"""Times rivals side by side: every round runs each of them once, the next round in the opposite order."""

from __future__ import annotations

import importlib
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.ceilings import copier, matrix_rate
from benchmarks.timing import (
    Bystanders,
    Clock,
    Run,
    clock_of,
    host_microseconds,
    inputs_needed,
    peak_memory,
    synchronise,
)
from v05.kernels.device import architecture

OURS = "v05"
GPU_BACKENDS = ("cuda", "triton")
GRAPHED = 2**31  # bytes up to which a case is captured: a graph keeps the memory that its largest call takes


@dataclass(frozen=True)
class Contender:
    """Something to time: `run` returns the tensors it computed, or is None where `why_missing` says why.

    A rival that computes less returns the first of ours.
    """

    name: str
    run: Run | None
    why_missing: str = ""


@dataclass(frozen=True)
class Case:
    """One op on one input. `bytes` and `flops` are what any implementation must move and compute, exp counting as one.

    `tolerance` is the largest difference between a rival's tensors and ours, relative to max(1, |value|), at which they
    count as having done the same work. `elements` is the size that dispatch goes by. `another` makes the same case on
    other inputs, from a seed: on a GPU a call then finds none of its inputs in the cache, since others were read in
    between; without it a small input stays there. `captured` is False where a call waits for the device, so that no
    graph can hold it.
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
    elements: int = 0
    another: Callable[[int], Case] | None = None
    captured: bool = True


class Row(NamedTuple):
    """One line of results.csv.

    `direction` is the pass (column `pass`). `fraction_of_ceiling`: the time that `ceiling` takes, over the time taken:
    a copy of as many bytes, or as many FLOPs of a matrix product, whichever is longer. `ratio_to_ours`: the median over
    the rounds of the contender's time over ours, so above 1 where ours is faster. `peak_mib`: memory needed on top of
    the inputs, outputs included. `other_load`: how many cores other processes used while this was timed; far from 0,
    the times are unreliable. `timed_by`: a replayed CUDA graph, which leaves the host out, CUDA events or the wall
    clock. `host_us`: what a call costs the host of a GPU. `copy_gb_s` and `matrix_gflop_s`: the ceilings, measured in
    the same run.
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
    timed_by: str
    host_us: str
    ceiling: str
    copy_gb_s: str
    matrix_gflop_s: str
    elements: int
    architecture: str


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
    """The commit measured, with `+` where the tree has changes: V05_COMMIT for a tree that came without its history."""
    if "V05_COMMIT" in os.environ:
        return os.environ["V05_COMMIT"]
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


@cache
def compiled(function: Callable[..., Sequence[Tensor]]) -> Callable[..., Sequence[Tensor]]:
    """torch.compile of a function; tensors are arguments, so that other inputs of the same sizes compile nothing."""
    return torch.compile(function)


def of_backends(make: Callable[[str], Run], device: torch.device) -> list[Contender]:
    """On a GPU, our own backends by name, `make(backend)` each: what dispatch's preference is drawn from."""
    return [Contender(f"{OURS} {name}", make(name)) for name in GPU_BACKENDS] if device.type == "cuda" else []


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |actual - expected| / max(1, |expected|) over actual's tensors; infinite where one alone is NaN."""
    worst = 0.0
    for a, b in zip(actual, expected[: len(actual)], strict=True):
        parts = (values.detach().flatten().split(2**26) for values in (a, b))  # in float64 the whole may not fit
        for x, y in zip(*parts, strict=True):
            if x.numel():
                gap = (x.double() - y.double()).abs() / y.abs().double().clamp(min=1)
                same = (x == y) | (x.isnan() & y.isnan())
                worst = max(worst, float(torch.where(same, 0, gap).nan_to_num(nan=math.inf).max()))
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
            if name == OURS:
                expected = [tensor.detach().clone() for tensor in result]
            elif expected and (error := difference(result, expected)) > case.tolerance:
                notes[name] = f"differs from v05 by {error:.1g}"
        except Exception as error:
            if name == OURS:
                raise
            notes[name] = f"failed: {error}".splitlines()[0][:120]
            continue
        runs[name] = contender.run
    return runs, notes


def clocks_of(case: Case, runs: dict[str, Run]) -> dict[str, Clock]:
    """A clock for each contender and, under the empty name, for a copy of as many bytes."""
    seeds = range(1, inputs_needed(case.bytes, case.device)) if case.another else ()
    others = [{c.name: c.run for c in case.another(seed).contenders} for seed in seeds] if case.another else []
    turns = {name: [run, *filter(None, (other[name] for other in others))] for name, run in runs.items()}
    turns[""] = [copier(case.bytes, case.device) for _ in range(1 + len(others))]
    graph = case.captured and case.bytes <= GRAPHED
    return {name: clock_of(runs, case.device, graph=graph) for name, runs in turns.items()}


def interleaved(clocks: dict[str, Clock], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call of every contender, round after round in alternating order, for about that many seconds.

    What takes longer in one tick than all the rounds may is timed by that tick alone.
    """
    times: dict[str, list[float]] = {}
    for name, clock in clocks.items():
        synchronise(device)
        times[name] = [clock.milliseconds()]
    took = {name: times[name][0] * clock.calls for name, clock in clocks.items()}
    order = [name for name in clocks if took[name] < seconds * 333 or name == OURS]
    rounds = int(min(400, max(5, seconds * 1e3 / max(sum(took[name] for name in order), 1e-3))))
    for name in order:
        times[name] = []
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            synchronise(device)
            times[name].append(clocks[name].milliseconds())
    return times


def text_of(value: float | None, pattern: str, unit: float = 1.0) -> str:
    """A number as a cell, empty where it was not measured."""
    return "" if value is None else pattern.format(value * unit)


def percentiles(times: list[float]) -> tuple[str, str, str]:
    """p20, p50 and p80 in milliseconds."""
    times = times * 2 if len(times) == 1 else times
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return tuple(f"{cut:.4g}" for cut in (cuts[1], cuts[4], cuts[7]))  # type: ignore[return-value]


def measure(case: Case, run_id: str, seconds: float) -> Iterator[Row]:
    """Warms up, times and describes every contender of a case, the missing ones too."""
    runs, notes = warm_up(case)
    matrix = matrix_rate(case.device, torch.get_num_threads())
    with Bystanders() as others:
        clocks = clocks_of(case, runs)
        times = interleaved(clocks, case.device, seconds)
    copy, product = statistics.median(times[""]), case.flops / matrix * 1e3
    del clocks[""]
    hows = {name: clocks.pop(name).how for name in list(clocks)}  # a graph's memory goes back with it
    for contender in case.contenders:
        name = contender.name
        p20 = p50 = p80 = reached = ratio = peak = host = ""
        if name in runs:
            p20, p50, p80 = percentiles(times[name])
            reached = f"{max(copy, product) / statistics.median(times[name]):.3g}"
            if len(times[name]) == 1:
                ratio = f"{times[name][0] / statistics.median(times[OURS]):.3g}"
                notes[name] = "; ".join(filter(None, [notes[name], "one call"]))
            else:
                ratio = f"{statistics.median(a / b for a, b in zip(times[name], times[OURS], strict=True)):.3g}"
            peak = text_of(peak_memory(runs[name], case.device), "{:.1f}", 2**-20)
            host = text_of(host_microseconds(runs[name], case.device), "{:.1f}")
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
            reached,
            ratio,
            peak,
            device_name(case.device),
            torch.get_num_threads(),
            text_of(others.cores, "{:.2f}"),
            f"python {platform.python_version()}, torch {torch.__version__}",
            commit(),
            notes[name],
            hows.get(name, ""),
            host,
            "copy" if copy >= product else "matrix",
            f"{case.bytes / copy / 1e6:.4g}",
            f"{matrix / 1e9:.4g}",
            case.elements,
            architecture(case.device.index or 0) if case.device.type == "cuda" else "",
        )
