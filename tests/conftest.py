"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# Test processes and their child processes run in parallel and share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most tests compare exact results, whose last bits are different on a GPU.
if os.environ.get("HETERO_FL_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from hypothesis import HealthCheck, settings

from hetero_fl.utils import processes
from hetero_fl.utils.environment import available_cores

# Further modules that most test runs import.
processes.PRELOADED.extend(["hetero_fl.experiment", "matplotlib.figure"])

# The default deadline of 200 ms per example fails on a busy machine.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# Background jobs of a shell ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """Start one process more than there are cores, because tests wait for nodes and timers."""
    return available_cores() + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without looking for garbage, because all modules and tests stay until the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that contain slow tests, so that all workers end at the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def reproducible() -> None:
    """Seed models that tests create, and use one thread.

    The number of threads changes the last bits of results.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Use double precision by default, for comparisons with reference implementations."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
