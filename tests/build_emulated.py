"""Builds csrc/cuda for the processor: the same sources, with the headers of emulator/include in place of CUDA's."""

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "emulated"
MODULE = FOLDER / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
EMULATOR = Path(__file__).with_name("emulator")
INCLUDE = [EMULATOR / "include", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
# Products are fused into additions, as nvcc fuses them.
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-march=native", "-ffp-contract=fast", "-fno-strict-aliasing", "-pthread", "-w"]


def main() -> None:
    """Compiles every source, as many at a time as there are cores, and links the module."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *os.environ.get("V05_CXX_FLAGS", "").split()]

    def compiled(source: Path) -> str:
        out = FOLDER / f"{source.name}.o"
        command = ["g++", "-c", "-x", "c++", str(source), "-o", str(out), *flags, *(f"-I{path}" for path in INCLUDE)]
        subprocess.run(command, check=True)
        return str(out)

    sources = [ROOT / "csrc" / "cuda_module.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run(["g++", "-shared", "-o", str(MODULE), *objects, *flags], check=True)


if __name__ == "__main__":
    sys.exit(main())
