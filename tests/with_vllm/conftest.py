"""These tests import vLLM, so they are collected only in the environment that `make test-vllm` sets up."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
