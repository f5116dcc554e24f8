"""Every method on worker processes: their number changes no bit of anything that a run computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hetero_fl.algorithms import register_algorithm
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.executors.workers import WorkerExecutor
from hetero_fl.federation.state_store import StateStore
from tests.federation.test_synchronous import METHODS
from tests.helpers import asynchronous_runs
from tests.helpers.small_federations import TOP, config
from tests.helpers.workers import Lent, lent, outcome, rounds_on, setup_of

MODELS = [
    {"name": "cnn", "width": 2, "norm": "batch"},
    {"name": "mlp", "hidden": [12], "dropout": 0.3},
    "linear",
]


def source(method: str) -> dict[str, Any]:
    """Four clients of three architectures, three of them in a round; BatchNorm, dropout, and a student at the server."""
    tiny = {
        "data__train_limit": 200,
        "data__proxy__size": 30,
        "data__test_limit": 30,
        "data__partition__min_size": 20,
    }
    return config(method, MODELS, 4, clients__per_round=3, server={"model": "linear"}, **tiny)


@pytest.fixture(scope="module")
def crew() -> Iterator[Lent]:
    with lent(setup_of(source("local")), 3) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_two_or_three_workers_compute_what_one_process_does(method: str, crew: Lent) -> None:
    setup = setup_of(source(method))
    want = outcome(rounds_on(setup, None), 2)
    assert not any(record["failed"] for record in want["records"])
    crew.take(setup)
    for size in (1, 2, 3):
        assert outcome(rounds_on(setup, crew, size), 2) == want


@pytest.mark.slow
@pytest.mark.parametrize("channel", [{}, TOP], ids=["plain", "topk"])
@pytest.mark.parametrize("method", ["hybrid", "fedproto", "fedasync", "fedbuff"])
def test_nor_do_they_in_an_asynchronous_run_in_which_everything_goes_wrong(
    method: str, channel: dict[str, Any], crew: Lent
) -> None:
    """Tasks of several versions, computed together."""
    made = asynchronous_runs.source(
        method,
        **({"algorithm__heads": "keep"} if method == "hybrid" else {"runtime__buffer": None}),
        channel=channel,
    )
    want = outcome(asynchronous_runs.session(made))
    assert sum(record["counts"]["failed"] for record in want["records"]) > 1
    setup = setup_of(made)
    crew.take(setup)
    for size in (1, 2, 3):
        crew.size = size
        workers = WorkerExecutor(
            crew,
            setup.federation.client_infos,
            StateStore(),
            make_backend(DeviceMemory(torch.device("cpu"))),
        )
        assert outcome(asynchronous_runs.session(made, workers)) == want


def test_each_is_read_in_one_sitting() -> None:
    own = [
        name
        for name in register_algorithm
        if register_algorithm[name].__module__.startswith("hetero_fl.")
    ]
    for name in own:
        assert len(inspect.getsource(register_algorithm[name]).splitlines()) <= 160, name
