"""These tests run Triton's kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 must be set before import."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("tests/interpreted runs with TRITON_INTERPRET=1, as `make test` does", returncode=2)
