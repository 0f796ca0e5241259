"""dispatch: the backend that runs, the reason why another does not, and what `v05 doctor` says of it."""

import pytest
import torch

from v05.doctor import backends, devices, versions
from v05.kernels import dispatch


@pytest.mark.parametrize("op", dispatch.OPS)
def test_the_cpu_kernel_runs_every_op_on_the_cpu(op):
    assert dispatch.choose(op, "cpu") == "cpu"
    assert dispatch.choose(op, "cpu", "reference") == "reference"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_backend_runs_or_says_why_not(op):
    for backend in dispatch.BACKENDS:
        reason = dispatch.why_not(op, backend, "cpu")
        if reason is None:
            assert dispatch.choose(op, "cpu", backend) == backend
            assert dispatch.implementation(op, backend).__name__ == f"v05.kernels.{op}.{backend}"
            continue
        with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot run {op} here: "):
            dispatch.choose(op, "cpu", backend)


def test_an_unknown_device_gets_the_reference():
    assert dispatch.choose("shrinkage", "meta") == "reference"
    assert "these are on meta" in dispatch.why_not("shrinkage", "cpu", "meta")


def test_doctor_reports_what_dispatch_chooses():
    for line in backends():
        assert line.reasons["reference"] is None
        assert line.reasons[line.chosen] is None
        assert line.chosen == dispatch.choose(line.op, line.device)
    assert versions()["torch"] == torch.__version__
    assert "threads" in devices()["cpu"]
