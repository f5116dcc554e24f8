"""Methods that share parameters: neither a resume nor the number of workers changes a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment import run
from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.serialization import encode
from tests.support.federations import MIXED, config, rounds_of

STATEFUL = [
    "heterofl",
    "scaffold",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedbn",
    "fedrep",
    "fedbabu",
    "ditto",
]


def source(method: str) -> dict[str, Any]:
    return config(method, MIXED, 5, clients__per_round=3, rounds=4)


def everything(rounds: SynchronousTrainer) -> bytes:
    """Return the complete state of a run as bytes."""
    private = {
        client_id: rounds.store.get(client_id) for client_id in rounds.federation.client_infos
    }
    clients = {
        client_id: {"models": p.models, "state": p.state} for client_id, p in private.items()
    }
    return encode({"run": rounds.state_dict(), "clients": clients}, "test")


@pytest.mark.slow
@pytest.mark.parametrize("method", STATEFUL)
def test_resumed_run_matches_uninterrupted_run(method: str, tmp_path: Path) -> None:
    uninterrupted = rounds_of(source(method))
    started = rounds_of(source(method), num_rounds=2, store=StateStore(tmp_path))
    Checkpoints(started.store, pytest.fail).save(2, {"run": started.state_dict()})
    store = StateStore(tmp_path)
    tree = Checkpoints(store, pytest.fail).load_newest()
    assert tree is not None
    resumed = rounds_of(source(method), num_rounds=0, store=store)
    resumed.load_state_dict(tree["run"])
    for _ in range(2):
        resumed.run_round()
    assert everything(resumed) == everything(uninterrupted)


@pytest.mark.slow
def test_worker_processes_match_one_process(tmp_path: Path) -> None:
    models = []
    for executor in ("serial", "processes"):
        runtime = {"threads": 1, "executor": executor, "chunk": 1} | (
            {"workers": 2} if executor == "processes" else {}
        )
        out = tmp_path / executor
        run(
            config("scaffold", "mlp", 3, runtime=runtime),
            out=out,
        )
        models.append(
            {p.name: p.read_bytes() for p in sorted((out / "models").glob("*.safetensors"))}
        )
    assert models[0] == models[1] and len(models[0]) == 4
