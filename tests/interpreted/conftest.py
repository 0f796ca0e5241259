"""These tests run Triton's kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 must be set before import."""

import os
from types import SimpleNamespace

import pytest
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("tests/interpreted runs with TRITON_INTERPRET=1, as `make test` does", returncode=2)

# At each call of a function in a kernel the interpreter puts its own operations into triton.language, always the same
# ones, which took half of the time: they are put there once, and stay.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)
