"""Every method on worker processes: their number changes no bit of the results."""

from __future__ import annotations

import ast
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
from tests.support import asynchronous_runs
from tests.support.federations import TOP, config
from tests.support.workers import (
    SharedProcessPool,
    outcome,
    rounds_on,
    setup_of,
    shared_process_pool,
)

MODELS = [
    {"name": "cnn", "width": 2, "norm": "batch"},
    {"name": "mlp", "hidden": [12], "dropout": 0.3},
    "linear",
]


def source(method: str) -> dict[str, Any]:
    """Return four clients of three architectures, three per round, and a server student."""
    tiny = {
        "data__train_limit": 200,
        "data__proxy__size": 30,
        "data__test_limit": 30,
        "data__partition__min_size": 20,
    }
    return config(method, MODELS, 4, clients__per_round=3, server={"model": "linear"}, **tiny)


@pytest.fixture(scope="module")
def pool() -> Iterator[SharedProcessPool]:
    with shared_process_pool(setup_of(source("local")), 3) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_workers_match_one_process(method: str, pool: SharedProcessPool) -> None:
    setup = setup_of(source(method))
    expected = outcome(rounds_on(setup, None), 2)
    assert not any(record["failed"] for record in expected["records"])
    pool.take(setup)
    for size in (1, 2, 3):
        assert outcome(rounds_on(setup, pool, size), 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("channel", [{}, TOP], ids=["plain", "topk"])
@pytest.mark.parametrize("method", ["hybrid", "fedproto", "fedasync", "fedbuff"])
def test_workers_match_one_process_in_asynchronous_runs_with_faults(
    method: str, channel: dict[str, Any], pool: SharedProcessPool
) -> None:
    """Compute tasks of several versions together."""
    run_config = asynchronous_runs.source(
        method,
        **({"algorithm__heads": "keep"} if method == "hybrid" else {"runtime__buffer": None}),
        channel=channel,
    )
    expected = outcome(asynchronous_runs.session(run_config))
    assert sum(record["counts"]["failed"] for record in expected["records"]) > 1
    setup = setup_of(run_config)
    pool.take(setup)
    for size in (1, 2, 3):
        pool.size = size
        workers = WorkerExecutor(
            pool,
            setup.federation.client_infos,
            StateStore(),
            make_backend(DeviceMemory(torch.device("cpu"))),
        )
        assert outcome(asynchronous_runs.session(run_config, workers)) == expected


def test_methods_are_short() -> None:
    names = [
        name
        for name in register_algorithm
        if register_algorithm[name].__module__.startswith("hetero_fl.")
    ]
    for name in names:
        tree = ast.parse(inspect.getsource(register_algorithm[name]))
        num_statements = sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
        assert num_statements <= 95, name
