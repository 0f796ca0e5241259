"""`make gpu` as far as it goes without a GPU: steps that pass, fail and never end, and what is told of them."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).parent / "gpu" / "run.py"


@pytest.fixture(scope="module")
def gpu_run():
    spec = importlib.util.spec_from_file_location("gpu_run", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


@pytest.fixture
def run_step(gpu_run, tmp_path):
    def run(name, code, limit=60.0):
        step = gpu_run.Step(name, [sys.executable, "-c", code], limit)
        return gpu_run.run(step, tmp_path, time.monotonic() + 60)

    return run


def test_a_step_passes_fails_or_is_ended(run_step, tmp_path):
    assert run_step("good", "print('fine')").status == "passed"
    failed = run_step("bad", "raise SystemExit('reason')")
    assert failed.status == "failed"
    assert failed.details[-1] == "reason"
    ended = run_step("endless", "while True: pass", limit=1.0)
    assert ended.status == "timed out"
    assert "ended after 1 s" in (tmp_path / "endless.log").read_text(encoding="utf-8")


def test_failures_come_first(gpu_run, run_step):
    results = [run_step("good", ""), run_step("bad", "raise SystemExit('reason')")]
    lines = gpu_run.summary(results).splitlines()
    assert lines[1] == "1 of 2 steps failed"
    assert [line.split()[:2] for line in lines if line.startswith(("PASSED", "FAILED"))] == [
        ["FAILED", "bad"],
        ["PASSED", "good"],
    ]


@pytest.mark.parametrize("killed", [False, True])
def test_tests_that_fail_are_named_even_where_the_run_was_ended(gpu_run, tmp_path, killed):
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n", encoding="utf-8")
    junit, log = tmp_path / "it.xml", tmp_path / "it.log"
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", f"--junitxml={junit}", "test_it.py"]
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(command, cwd=tmp_path, stdout=file, check=False)
    if killed:
        junit.unlink()
    lines = gpu_run.failures_of(junit, log)
    assert "test_bad" in lines[0]
    assert not any("test_good" in line for line in lines)
    if not killed:
        assert lines[-1] == "2 tests, 1 failed, 0 skipped"


def test_what_rivals_compile_is_not_compiled_while_anything_is_timed(gpu_run, tmp_path):
    compiling, checks, timings = gpu_run.steps("90", tmp_path, 0.5)
    everything = [*compiling, *(step for group in checks + timings for step in group)]
    assert len({step.name for step in everything}) == len(everything)
    assert all("--warm-up" in step.command for step in compiling)
    assert all(len(group) == 1 for group in timings)
    ops = {name for ops, _first in gpu_run.BENCHES.values() for name in ops}
    assert {step.name for step in compiling} == {f"compile-{op}" for op in ops}
