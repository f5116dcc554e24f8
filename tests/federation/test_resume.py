"""Resume for methods with server training or client state beyond the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.federation.checkpoint import Checkpoints
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from tests.support.federations import MIXED, config, rounds_of

SETTINGS: list[dict[str, Any]] = [
    {"name": "fedtgp"},
    {"name": "fedgh"},
    {"name": "fedgen", "latent_weight": 0.5, "decay": 0.9},
    {"name": "fedmrl"},
    {"name": "fedmd", "proxy_rows": 20, "teacher": "entropy"},
    {
        "name": "fedmd",
        "initial_phase": True,
        "initial_public_epochs": 2,
        "initial_private_epochs": 2,
    },
    {"name": "kt_pfl", "initial_phase": True},
    {"name": "hybrid", "proxy_rows": 20},
]


def leaves(tree: Any, at: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in leaves(part, (*at, name)).items()}
    return {at: tree}


def everything(rounds: SynchronousTrainer) -> dict[tuple[Any, ...], Any]:
    kept = {client_id: rounds.store.get(client_id) for client_id in rounds.federation.client_infos}
    return leaves(
        {
            "run": rounds.state_dict(),
            **{client_id: {"models": p.models, "state": p.state} for client_id, p in kept.items()},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["name"])
def test_resumed_run_equals_uninterrupted_run(settings: dict[str, Any], tmp_path: Path) -> None:
    source = config(
        settings["name"],
        MIXED,
        clients=4,
        clients__per_round=3,
        algorithm=settings,
        rounds=4,
        data__proxy__labels=True,
    )
    plain = rounds_of(source)
    first = rounds_of(source, num_rounds=2, store=StateStore(tmp_path))
    Checkpoints(first.store, pytest.fail).save(2, {"run": first.state_dict()})
    again = rounds_of(source, num_rounds=0, store=StateStore(tmp_path))
    saved = Checkpoints(again.store, pytest.fail).load_newest()
    assert saved is not None
    again.load_state_dict(saved["run"])
    for _ in range(2):
        again.run_round()
    expected, got = everything(plain), everything(again)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (
            torch.equal(value, got[name]) if isinstance(value, torch.Tensor) else value == got[name]
        ), name
