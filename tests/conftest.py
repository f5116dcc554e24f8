"""What all tests have in common."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Test processes run next to one another, and so do the processes that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from hetero_fl.utils import processes

# What most runs of tests import besides.
processes.PRELOADED.extend(["hetero_fl.experiment", "sklearn.datasets", "matplotlib.figure"])

# A busy machine must not fail a test: by default an example has 200 ms.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# Background jobs of a shell ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small models gain nothing from threads, and their number decides the last bits."""
    torch.set_num_threads(1)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision, where rules are compared with independent references."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
