"""`make gpu`: builds for the present GPU, tests every op on it, watches the kernels with compute-sanitizer, benchmarks.

Needs no network, runs in the Python it is started with, and goes on after a failure. Exit status: 0 where all is well,
1 where something failed, 2 without a GPU. In the folder `--out` it leaves a log per step, tests.xml and large.xml
(JUnit), steps.json, benchmarks/results.csv and benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
BUDGET = 530  # seconds for everything
TAIL = 12  # lines of a failed step's log in the summary
BENCHES = {  # ops that share a process, which spares the rivals' imports, and how many of the cases of each
    "groups": (("shrinkage", "advantage", "calibration"), None),
    "tokens": (("policy_loss",), None),
    "rows": (("query_attention", "token_logprob", "linear_logprob"), 4),
}
PROBE = """
import sys, torch
if not torch.cuda.is_available(): sys.exit(1)
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
"""


@dataclass(frozen=True)
class Step:
    """A command with its own limit in seconds; `junit` names the report it leaves."""

    name: str
    command: list[str]
    limit: float
    junit: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """How a step ended: `status` is "passed", "failed" or "timed out"."""

    name: str
    status: str
    seconds: float
    log: str
    details: list[str]


def probe() -> list[str] | None:
    """The architecture and the description of the present GPU, or None."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    return done.stdout.strip().split(maxsplit=1) if done.returncode == 0 else None


def pytest_step(name: str, selection: str, out: Path, limit: float, parallel: bool) -> Step:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", selection, "-p", "no:cacheprovider", "-vv", "-rfEs"]
    if parallel and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, min(12, (os.cpu_count() or 4) - 4))), "--dist", "worksteal"]
    return Step(name, [*command, f"--junitxml={out / name}.xml"], limit, out / f"{name}.xml")


def sanitizer_step(tool: str, backend: str, part: str, limit: float) -> Step:
    """Each tensor is an allocation of its own under memcheck, so that a step past its end is one into nothing."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    command += ["--launch-timeout", "120"]  # the others keep the processor busy
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "tests/gpu/every_kernel.py", "--backend", backend, "--part", part]
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return Step(f"{tool}-{backend}-{part}", command, limit, environment=own)


def steps(architecture: str, out: Path, seconds: float) -> tuple[list[Step], list[list[Step]], list[list[Step]]]:
    """What checks and what times: groups of steps, one after the other, those of a group at the same time. Before them
    the steps that run beside all that checks and end before anything is timed."""
    python = sys.executable
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-build-isolation"]
    target = {"V05_CUDA_ARCHS": architecture, "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    build = Step("build", [*install, "--no-deps", "-v", "-e", "."], 150, environment=target)
    imports = Step("import", [python, "-c", "import v05.kernels._cpu, v05.kernels._cuda, triton"], 60)
    watched = itertools.product(("memcheck", "racecheck"), ("cuda", "triton"), ("groups", "rows"))
    sanitizers = [sanitizer_step(*what, 200) for what in watched]
    tests = pytest_step("tests", "not large", out, 300, parallel=True)  # leaves Triton's kernels compiled behind
    large = pytest_step("large", "large", out, 90, parallel=False)
    base = [python, "-m", "benchmarks", "--output", str(out / "benchmarks")]
    bench = [*base, "--device", "cuda", "--seconds", str(seconds), "--rows-only"]
    benches, compiling = [], []  # what rivals compile
    for name, (ops, first) in BENCHES.items():
        some = [] if first is None else ["--first", str(first)]
        benches.append([Step(f"bench-{name}", [*bench, *some, *itertools.chain(*(("--op", op) for op in ops))], 150)])
        compiling += [Step(f"compile-{op}", [*bench, *some, "--op", op, "--warm-up"], 200) for op in ops]
    report = Step("bench-report", [*base, "--report-only"], 30)
    return compiling, [[build], [imports], [tests, *sanitizers], [large]], [*benches, [report]]


def failures_of(junit: Path, log: Path) -> list[str]:
    """A line for each test that failed, and one that counts the tests; of a run that was ended, from its log."""
    if not junit.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line[:240] for line in lines if " FAILED " in line or " ERROR " in line]
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    lines = []
    for case in cases:
        for child in case:
            if child.tag in ("failure", "error"):
                first = (child.get("message") or "").strip().split("\n", 1)[0]
                lines.append(f"{case.get('classname')}::{case.get('name')}: {first}"[:240])
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    return [*lines, f"{len(cases)} tests, {len(lines)} failed, {skipped} skipped"]


def run(step: Step, out: Path, deadline: float) -> Result:
    """Runs a step into its log and ends it, children included, at its limit or at the deadline."""
    begin, log = time.monotonic(), out / f"{step.name}.log"
    limit = max(1.0, min(step.limit, deadline - begin))
    with log.open("w", encoding="utf-8") as file:
        print(*step.command, file=file, flush=True)
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": PATH} | step.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = "passed" if process.wait(timeout=limit) == 0 else "failed"
        except OSError as error:
            print(error, file=file)
            status = "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"\nended after {limit:.0f} s", file=file)
            status = "timed out"
    details = failures_of(step.junit, log) if step.junit else []
    if status != "passed":
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        details += [] if step.junit and step.junit.exists() else lines[-TAIL:]
    result = Result(step.name, status, round(time.monotonic() - begin, 1), log.name, details)
    print(f"{result.status:10} {result.name:20} {result.seconds:6.1f} s", flush=True)
    return result


def summary(results: list[Result]) -> str:
    """What failed, with its reasons, then what passed."""
    failed = [result for result in results if result.status != "passed"]
    lines = [f"\n{len(failed)} of {len(results)} steps failed" if failed else f"\nall {len(results)} steps passed"]
    for result in [*failed, *(result for result in results if result.status == "passed")]:
        lines.append(f"{result.status.upper():10} {result.name} ({result.seconds} s, {result.log})")
        lines += [f"    {line}" for line in result.details]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per benchmark case")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--only", action="append", help="steps whose name begins so; may be repeated; all if not given")
    options = parser.parse_args()
    found = probe()
    if found is None:
        print("make gpu: torch finds no GPU here")
        return 2
    begin, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{found[1]}, sm_{found[0]}; logs in {out}", flush=True)
    results: list[Result] = []

    def run_together(group: list[Step]) -> None:
        chosen = [step for step in group if step.name.startswith(tuple(options.only or ("",)))]
        with ThreadPoolExecutor(len(chosen) or 1) as pool:
            results.extend(pool.map(lambda step: run(step, out, begin + options.budget), chosen))

    beside, checks, timings = steps(found[0], out, options.seconds)
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(run_together, beside)
        for group in checks:
            run_together(group)
        compiled.result()
    for group in timings:
        run_together(group)
    steps_told = {"device": found[1], "seconds": time.monotonic() - begin, "steps": [asdict(r) for r in results]}
    (out / "steps.json").write_text(json.dumps(steps_told, indent=1), encoding="utf-8")
    text = summary(results)
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(result.status != "passed" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
