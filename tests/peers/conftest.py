"""These tests import TRL and verl, so they are collected only in the environment that `make test-peers` sets up."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("verl") and find_spec("trl") else ["test_*.py"]
