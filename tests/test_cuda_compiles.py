"""csrc/cuda compiles for every NVIDIA target without a warning or a spill, and the module refuses without a driver."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = ("80", "90", "100")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: CUDA is not built here")


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_source_compiles_without_a_warning_or_a_spill(source, tmp_path):
    output = tmp_path / "out.o"
    command = ["nvcc", "-c", str(source), "-o", str(output), f"-I{ROOT / 'csrc'}", "-O3", "-std=c++17"]
    command += ["--expt-relaxed-constexpr", "-Werror", "all-warnings", "--resource-usage"]
    command += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = done.stderr + done.stdout
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", report)
    assert {target for _, target in kernels} == set(TARGETS)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == len(kernels)
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 200  # two blocks of 128 threads on a multiprocessor


@needs_nvcc
def test_without_a_driver_the_module_imports_and_every_launch_is_refused():
    if torch.cuda.is_available():
        pytest.skip("a GPU is present: its tests are those of `make gpu`")
    command = [sys.executable, str(Path(__file__).with_name("launch_without_driver.py"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-500:]
    assert [line for line in lines if not re.search(r": \w+: .*(driver|device|context)", line)] == []
    assert len(lines) == 4 * (8 + 2 + 12) + 2 * 6
