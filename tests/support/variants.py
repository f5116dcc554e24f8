"""Ways to compute a run that must not change a bit of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch

from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.workers import PooledExecutor, WorkerSetup
from hetero_fl.federation.simulation.executor import SimulatedExecutor
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.serialization import decode, encode
from tests.support.federations import state_of
from tests.support.workers import SharedProcessPool

Outcome = dict[str, Any]
"""All results of a run: records without seconds, encoded states, scores and traffic."""

VARIANTS = ("workers", "reversed groups", "resumed", "evaluated")


def assert_invariant(source: Mapping[str, Any], pool: SharedProcessPool, number: int = 0) -> None:
    """Check that a run with all variants at once, and with one of them, equals the plain run.

    On a difference, each variant is run alone, and the failure names those that change the result.

    Args:
        source: The configuration.
        pool: Worker processes.
        number: Selects the variant that is also run alone, so that tests of many methods run each.
    """
    expected = outcome(source, (), pool)
    assert all(record["cohort"] for record in expected["records"].values())
    for variants in (VARIANTS, VARIANTS[number % len(VARIANTS) :][:1]):
        found = outcome(source, variants, pool)
        if place := first_difference(expected, found):
            guilty = [v for v in VARIANTS if outcome(source, (v,), pool) != expected]
            pytest.fail(f"{' and '.join(variants)} change {place}; alone: {guilty}")


def first_difference(expected: Outcome, found: Outcome) -> str | None:
    """Return the first place in which two results differ, such as `records.1.cohort`."""
    for key in expected.keys() | found.keys():
        first, second = expected.get(key), found.get(key)
        if isinstance(first, dict) and isinstance(second, dict):
            if place := first_difference(first, second):
                return f"{key}.{place}"
        elif first != second:
            return str(key)
    return None


def outcome(
    source: Mapping[str, Any], variants: tuple[str, ...], pool: SharedProcessPool
) -> Outcome:
    """Run a configuration with variants.

    Args:
        source: The configuration.
        variants: Names from `VARIANTS`.
        pool: Worker processes.
    """
    torch.set_num_threads(1)
    source = deepcopy(dict(source))
    if "reversed groups" in variants:
        source["clients"]["groups"].reverse()
    make = _maker(source, pool if "workers" in variants else None)
    trainer = make(StateStore())
    records = {}
    for number in range(1, prepare(source).config.rounds + 1):
        records[str(number)] = {k: v for k, v in trainer.run_round().items() if k != "seconds"}
        if "evaluated" in variants:
            trainer.evaluate()
        if "resumed" in variants:
            saved = encode(trainer.state_dict(), "run")
            trainer = make(trainer.store)
            trainer.load_state_dict(decode(saved, "run"))
    scores = trainer.evaluate(details=True)
    return {"records": records, "state": state_of(trainer), "scores": scores}


def _maker(
    source: dict[str, Any], pool: SharedProcessPool | None
) -> Callable[[StateStore], FederatedTrainer]:
    """Return a function that creates the trainer of a run, with its state in a store."""
    prepared = prepare(source)
    if pool is not None:
        pool.take(WorkerSetup(prepared.method, prepared.federation, 1, ("cpu",)))

    def make(store: StateStore) -> FederatedTrainer:
        trainer = prepared.make_trainer(store=store)
        if pool is not None:
            backend = make_backend(DeviceMemory(torch.device("cpu")))
            infos = prepared.federation.client_infos
            workers = PooledExecutor(pool, infos, store, backend)
            if isinstance(trainer.executor, SimulatedExecutor):
                trainer.executor.inner = workers
                trainer.executor.backend = backend
            else:
                trainer.executor = workers
        return trainer

    return make
