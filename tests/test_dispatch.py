"""dispatch: the backend that runs, the reason why another does not, and what `v05 doctor` says of it."""

import subprocess
import sys

import pytest
import torch

from v05.doctor import backends, devices, versions
from v05.kernels import dispatch, wins


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


def test_the_mark_for_the_compiler_is_the_one_that_torch_makes():
    marked = dispatch.constant_for_compile(lambda: "")
    assert vars(marked) == vars(torch.compiler.assume_constant_result(lambda: "")) != {}


def test_importing_the_kernels_does_not_import_the_compiler():
    code = "import sys, v05.kernels; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_backend_is_named_with_those_there_are():
    allowed = "'cuda', 'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=f"backend is 'gpu'; allowed: None or one of {allowed}"):
        dispatch.choose("shrinkage", "cpu", "gpu")


def test_an_unknown_device_gets_the_reference():
    assert dispatch.choose("shrinkage", "meta") == "reference"
    assert "these are on meta" in dispatch.why_not("shrinkage", "cpu", "meta")


def test_the_win_nearest_in_size_counts():
    def win(elements, *order, op="token_logprob", architecture="sm_90"):
        return wins.Win(op, architecture, "bfloat16", elements, order, "")

    small, large = win(2**10, "triton", "cuda"), win(2**30, "cuda", "triton")
    measured = [small, large, win(2**15, "triton", architecture="sm_80"), win(2**15, "cuda", op="shrinkage")]
    for elements, expected in ((0, small), (2**19, small), (2**21, large), (2**40, large)):
        assert wins.nearest(measured, "token_logprob", "sm_90", "bfloat16", elements) is expected
    assert wins.nearest(measured, "token_logprob", "sm_90", "float32", 2**10) is None
    assert wins.nearest(measured, "policy_loss", "sm_90", "bfloat16", 2**10) is None


def test_on_a_gpu_the_backend_that_won_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")
    fastest = dispatch._fastest.__wrapped__  # not to be remembered
    for order in (("cuda", "triton"), ("triton", "cuda")):
        win = wins.Win("token_logprob", "sm_90", "bfloat16", 2**20, order, "")
        monkeypatch.setattr(wins, "recorded", lambda win=win: [win])
        assert fastest("token_logprob", 0, torch.bfloat16, 20) == order[0]
        assert fastest("token_logprob", 0, torch.float32, 20) == "cuda"


def test_the_wins_recorded_name_ops_and_backends_that_exist():
    for win in wins.recorded():
        assert win.op in dispatch.OPS
        assert set(win.order) <= set(dispatch.BACKENDS)
        assert win.elements > 0


def test_a_cpu_tensor_gets_the_cpu_kernel():
    assert dispatch.backend_for("shrinkage", torch.zeros(3)) == "cpu"
    assert dispatch.backend_for("shrinkage", torch.zeros(3), "reference") == "reference"


def test_doctor_reports_what_dispatch_chooses():
    for line in backends():
        assert line.reasons["reference"] is None
        assert line.reasons[line.chosen] is None
        assert line.chosen == dispatch.choose(line.op, line.device)
    assert "threads" in devices()["cpu"]


def test_doctor_names_the_build_of_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")  # whose wheel calls itself 2.15.0
    assert versions()["torch"] == "2.15.0+cu132"
