"""Compiles Triton kernels for GPUs that are not here, and reads back registers, spills and shared memory."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What is compiled for sm_80 runs on 8.6, 8.9 and 12.0 too, where a block has 99 KiB instead of 163.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Resources(NamedTuple):
    """Of one compiled kernel: registers a thread (0 where not told), bytes spilled a thread, bytes of shared memory,
    and the PTX, if any."""

    registers: int
    spilled: int
    shared: int
    ptx: str = ""


def signature_of(kernel, types: dict[str, str], constants: dict[str, object]) -> dict[str, str]:
    """The types of all arguments in their order; those with a constant are constexpr."""
    names = [parameter.name for parameter in kernel.params]
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    return {name: "constexpr" if name in constants else types[name] for name in names}


def compile_for(
    target: str,
    kernel,
    types: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...] = (),
    **options,
) -> Resources:
    """Compiles one kernel for one target.

    Args:
        target: a key of `TARGETS`.
        kernel: a `triton.jit` function, not interpreted.
        types: Triton's type of each argument that is not a constant, such as `*fp32` or `i64`.
        constants: values of the constexpr arguments.
        aligned: arguments that are multiples of 16, as a launch finds out for those that it may specialise on.
        options: such as `num_warps`.
    """
    signature = signature_of(kernel, types, constants)
    attributes = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options or None)
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        # Scalar registers are spilled into lanes of vector registers, not to memory.
        spills = [int(count) for count in re.findall(r"vgpr_spill_count:\s+(\d+)", text)]
        registers = [int(count) for count in re.findall(r"\.vgpr_count:\s+(\d+)", text)]
        return Resources(max(registers), sum(spills), compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        dump = [str(CUOBJDUMP), "--dump-resource-usage", cubin.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Resources(registers, stack + local, compiled.metadata.shared, compiled.asm["ptx"])


def assert_it_fits(target: str, resources: Resources) -> None:
    """Fails on a spill, or on more shared memory than the target has."""
    assert resources.spilled == 0, f"{target}: spills {resources.spilled} bytes a thread"
    assert resources.shared <= SHARED_MEMORY[target], f"{target}: {resources.shared} bytes of shared memory"
    assert 0 < resources.registers <= 512
