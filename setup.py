"""Builds the native kernels: csrc/cpu, and csrc/cuda where nvcc is found; none with V05_BUILD=0. No torch is needed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
FORMULAS = [str(CSRC / name) for name in ("formulas.h", "inputs.h", "calibration.h", "attention_binding.h")]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler has none
CPU_FLAGS = ["-O3", "-g0", "-std=c++17", *OPENMP, "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CPU_FLAGS += ["-Wall", "-fno-thread-jumps"]  # g++ threads jumps through selects, which then do not vectorise
CPU_FLAGS += ["-Wno-ignored-optimization-argument", "-Wno-bitwise-instead-of-logical"]  # clang on that, and on & for &&
CUDA_FLAGS = ["-O3", "-std=c++17", "--threads=2", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
ARCHITECTURES = ("80", "90", "100", "120")


def cuda_architectures(nvcc: str) -> list[str]:
    """V05_CUDA_ARCHS ("80;90"), or those of ARCHITECTURES that this toolkit compiles for."""
    if asked := os.environ.get("V05_CUDA_ARCHS"):
        return [re.sub(r"\D", "", arch) for arch in re.split(r"[;, ]+", asked.strip())]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ARCHITECTURES if re.search(rf"sm_{arch}\b", known)]


class BuildNative(build_ext):
    """Compiles .cpp by the C++ compiler and .cu by nvcc, a file a core, and links CUDA statically, without a path."""

    def build_extensions(self) -> None:
        serial = self.compiler.compile
        with ThreadPoolExecutor(os.cpu_count()) as self.pool:
            self.compiler.compile = lambda sources, **options: [
                *chain(*self.pool.map(lambda source: serial([source], **options), sources))
            ]
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if not any(source.endswith(".cu") for source in ext.sources):
            super().build_extension(ext)
            return
        nvcc = shutil.which("nvcc") or "nvcc"
        archs = cuda_architectures(nvcc)
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            out = str(Path(self.build_temp) / (Path(source).name + ".o"))
            command = [nvcc, "-c", source, "-o", out, "-Icsrc", *CUDA_FLAGS, *ext.extra_compile_args]
            command += targets if source.endswith(".cu") else [f"-I{path}" for path in ext.include_dirs]
            subprocess.run(command, check=True)
            return out

        objects = list(self.pool.map(compiled, ext.sources))
        (target := Path(self.get_ext_fullpath(ext.name))).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, "-shared", "-cudart", "static", "-o", str(target), *objects], check=True)


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for ending in endings for path in (CSRC / folder).glob(f"*{ending}"))


def extensions() -> list[Extension]:
    if os.environ.get("V05_BUILD") == "0":
        return []
    include = ["csrc", pybind11.get_include()]
    flags = os.environ.get("V05_CXX_FLAGS", "").split()
    cpu = Extension(
        "v05.kernels._cpu",
        ["csrc/cpu_module.cpp", *sources("cpu", ".cpp")],
        include_dirs=include,
        depends=["setup.py", *FORMULAS, *sources("cpu", ".h")],
        extra_compile_args=CPU_FLAGS + flags,
        extra_link_args=[*OPENMP, *flags],
        language="c++",
    )
    if os.environ.get("V05_BUILD_CUDA") == "0" or not shutil.which("nvcc") or not sources("cuda", ".cu"):
        print("v05: building the CPU kernels only", file=sys.stderr)
        return [cpu]
    cuda = Extension(
        "v05.kernels._cuda",
        ["csrc/cuda_module.cpp", *sources("cuda", ".cu")],
        include_dirs=[*include, sysconfig.get_paths()["include"]],
        depends=["setup.py", *FORMULAS, *sources("cuda", ".cuh", ".h")],
        language="c++",
    )
    return [cpu, cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative}, options={"build_ext": {"parallel": 2}})
