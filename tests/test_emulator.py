"""The emulation that runs the CUDA kernels on the processor tells right kernels from wrong ones."""

import ctypes
import subprocess
from enum import IntEnum

import pytest
import torch
from build_emulated import EMULATOR, FLAGS, INCLUDE


class Kernel(IntEnum):
    MIRROR, TWICE, HALF_WAIT, COPY, CLUSTER, PATIENCE, THREADS = range(7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a kernel of kernels.cu in its right or its wrong form; gives what it wrote, or the error."""
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    command = ["g++", "-x", "c++", str(EMULATOR / "kernels.cu"), "-shared", "-o", str(library), *FLAGS]
    subprocess.run([*command, *(f"-I{path}" for path in INCLUDE)], check=True)
    call = ctypes.CDLL(str(library)).run
    call.restype = ctypes.c_char_p
    call.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p]

    def run(kernel, right, begin=0):
        values, out = torch.arange(1100.0), torch.zeros(256)
        error = call(kernel, right, values[begin:].data_ptr(), out.data_ptr())
        return out if error is None else error.decode()

    return run


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel.MIRROR, torch.arange(256.0).flip(0)),
        (Kernel.TWICE, torch.full((256,), 3.0)),
        (Kernel.HALF_WAIT, torch.ones(256)),
        (Kernel.COPY, torch.arange(256.0) * 4),
        (Kernel.CLUSTER, torch.eye(1, 256)[0] * 36),
    ],
)
def test_a_right_kernel_gives_what_it_should(run, kernel, expected):
    for _ in range(20):
        assert torch.equal(run(kernel, True), expected)


@pytest.mark.parametrize("kernel", [Kernel.MIRROR, Kernel.TWICE])
def test_a_missing_barrier_shows(run, kernel):
    """One before others read, and one before what they read is written again."""
    right = run(kernel, True)
    assert any(not torch.equal(run(kernel, False), right) for _ in range(20))


def test_a_copy_that_is_not_waited_for_is_not_there(run):
    assert torch.equal(run(Kernel.COPY, False)[1:], torch.zeros(255))


def test_a_copy_from_a_crooked_address_is_named(run):
    assert "not a multiple" in run(Kernel.COPY, True, begin=1)


def test_a_cluster_that_does_not_wait_shows(run):
    assert any(float(run(Kernel.CLUSTER, False)[0]) != 36 for _ in range(50))


@pytest.mark.parametrize("kernel", [Kernel.HALF_WAIT, Kernel.PATIENCE])
def test_threads_that_wait_for_ever_are_named(run, kernel):
    """Half of them at a barrier and the others elsewhere; for a word of another block."""
    assert run(kernel, False) == "threads wait for others that never come"


def test_more_threads_than_a_block_holds_are_refused(run):
    assert run(Kernel.THREADS, False) == "refused"
