"""Small federations on scikit-learn's digits: complete runs in a fraction of a second per round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.communication.protocol import encoded
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Plan
from hetero_fl.experiment import prepare
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.serialization import encode

METHODS = sorted(
    name for name in register_algorithm if register_algorithm[name].__module__[:10] == "hetero_fl."
)
DEFAULTS = {name: register_algorithm[name]() for name in METHODS}
"""Each method with its default settings."""
SINGLE_UPLOADS = [
    name
    for name, method in DEFAULTS.items()
    if any(spec.use == "each" for spec in method.uploads.values())
]
"""Methods whose server needs the upload of each client."""
SUMMING = [
    name
    for name, method in DEFAULTS.items()
    if name not in SINGLE_UPLOADS
    and not method.needs.all_clients
    and method.needs.asynchronous is None
]
"""Methods whose server needs only sums of uploads, and whose runs may be synchronous."""
TOP: dict[str, Any] = {
    "compress": [{"topk": 0.1}, {"quantize": 8}]
    # A channel with compression residuals.
}
QUICK = {
    "dense": {
        "synthesis_epochs": 2,
        "generator_steps": 3,
        "student_steps": 4,
        "synthetic_batch": 16,
    },
    "fedgen": {"generator_steps": 5},
    "fedgh": {"server_epochs": 10},
    "fedtgp": {"server_epochs": 10},
}
MIXED = [
    "cnn_bn_small",
    {"name": "mlp", "hidden": [24]},
    {"name": "cnn", "width": 4, "norm": "group"},
]


def config(
    method: str = "fedavg", models: Any = "cnn_bn_small", clients: int = 3, **changes: Any
) -> dict[str, Any]:
    """Return a configuration; `__` in keyword arguments stands for dots (`data__proxy__size=0`)."""
    run_config: dict[str, Any] = {
        "name": "small",
        "rounds": 2,
        "data": {
            "name": "digits",
            "train_limit": 330,
            "test_limit": 90,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 30},
            "proxy": {"size": 60},
        },
        "clients": {
            "defaults": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch_size": 16,
            },
            "groups": [{"name": "site", "count": clients, "model": models}],
        },
        "algorithm": {"name": method, **QUICK.get(method, {})},
        "runtime": {"threads": 1},
        # Plots take longer than the rounds.
        "output": {"plots": False, "report": False},
    }
    return changed(run_config, **changes)


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Change a configuration in place at some keys (`__` for dots) and return it."""
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return settings


def rounds_of(
    source: dict[str, Any], num_rounds: int | None = None, store: StateStore | None = None
) -> FederatedTrainer:
    """Return a run after some rounds (default: all), in memory unless a store is passed."""
    torch.set_num_threads(1)
    prepared = prepare(source)
    rounds = prepared.make_trainer(store=store)
    for _ in range(prepared.config.rounds if num_rounds is None else num_rounds):
        rounds.run_round()
    return rounds


def runtime_of(trainer: FederatedTrainer) -> ClientRuntime:
    """Return the runtime of the clients of a run in this process, whose time may be simulated."""
    runtime = getattr(trainer.executor, "inner", trainer.executor).runtime
    assert isinstance(runtime, ClientRuntime)
    return runtime


def change_method(trainer: FederatedTrainer, **hooks: Any) -> None:
    """Let a run in this process use its method with other hooks."""
    method = type("Changed", (type(trainer.algorithm),), hooks)(**trainer.algorithm.model_dump())
    set_method(trainer, method)


def set_method(trainer: FederatedTrainer, method: Algorithm) -> None:
    """Let a run in this process use another method."""
    trainer.algorithm = trainer.link.algorithm = trainer.link.expectations.algorithm = method
    runtime_of(trainer).algorithm = method


def poison_upload(trainer: FederatedTrainer, client_id: str, round_idx: int, item: str) -> None:
    """Put NaNs into an item of a client's upload in a round."""
    train = type(trainer.algorithm).train

    def poisoned(method: Any, client: Participant, received: Payload) -> Plan[dict[str, Any]]:
        items: dict[str, Any] = yield from train(method, client, received)
        if client.participant_id == client_id and client.round_context.round_idx == round_idx:
            values = tree_map(lambda tensor: tensor * float("nan"), items[item].values)
            items[item] = replace(items[item], values=values)
        return items

    change_method(trainer, train=poisoned)


def stop_after(round_idx: int) -> Callable[[dict[str, Any]], None]:
    """Return a callback that interrupts a run after a round."""

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == round_idx:
            raise KeyboardInterrupt

    return stop


def broadcasts(
    trainer: FederatedTrainer, clients: Iterable[str], for_evaluation: bool = False
) -> dict[str, bytes]:
    """Return the server's next broadcasts by client."""
    infos = [trainer.federation.client_infos[client] for client in clients]
    if for_evaluation:
        infos = [replace(info, purpose="evaluate") for info in infos]
    return {
        info.client_id: encoded(trainer.link.content(trainer.link.broadcast(info)))
        for info in infos
    }


def deployed(rounds: FederatedTrainer, client_id: str) -> Participant:
    """Return the client with the model that it would use now."""
    site = runtime_of(rounds)
    body = broadcasts(rounds, [client_id], for_evaluation=True)[client_id]
    return site.deploy_clients(
        {client_id: site.links.decode_broadcast(rounds.completed, body)}, rounds.completed
    )[client_id]


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of named tensors are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def state_of(trainer: FederatedTrainer) -> dict[str, bytes]:
    """Return the encoded models and state of the server and the private state of each client."""
    server = trainer.server
    return {
        "server": encode([server.models, server.state], "server"),
        **{client: trainer.store.encoded(client) for client in trainer.federation.client_infos},
    }
