"""Of every test: a thread or two, a group, property tests in a quick or a long profile (HYPOTHESIS_PROFILE=long)."""

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

settings.register_profile("quick", max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread():
    """A thread, so that sums have one order: two runs are the same bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def group():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()
