"""These tests import verl and Ray, so they are collected only in the environment that `make test-verl` sets up."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("verl") and find_spec("ray") and find_spec("transfer_queue") else ["test_*.py"]
