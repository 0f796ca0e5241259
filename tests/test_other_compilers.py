"""csrc/cpu compiles without a warning by clang, for ARM, and where there is no OpenMP; elsewhere it is built by g++."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
FLAGS = ["-O0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Werror", "-Wno-bitwise-instead-of-logical"]  # where && would be a branch, & is meant


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "aarch64-linux-gnu", "aarch64-macos"])
def test_clang_compiles_every_source(target, tmp_path):
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target]
    for source in SOURCES:
        command = [*compiler, *FLAGS, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
