"""These tests train with TRL, so they are collected only in the environment that `make test-trl` sets up."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("trl") and find_spec("peft") else ["test_*.py"]
