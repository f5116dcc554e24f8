"""The configurations whose results are compared, as dictionaries of the public schema.

They use nothing but contracts (configuration keys and method names), so that the same file runs on
an old and on a new version of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

Config = dict[str, Any]

METHODS = [
    "local",
    "centralized",
    "ensemble",
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "scaffold",
    "fednova",
    "fedbn",
    "fedper",
    "fedrep",
    "fedbabu",
    "lg_fedavg",
    "ditto",
    "heterofl",
    "fedmd",
    "feddf",
    "fd",
    "ds_fl",
    "kt_pfl",
    "fedgkt",
    "fml",
    "fedkd",
    "fedproto",
    "fedtgp",
    "fedgh",
    "fedgen",
    "dense",
    "hybrid",
    "fedasync",
    "fedbuff",
    "fedmrl",
    "fedavg_ft",
    "fedlc",
]

_SETTINGS: Mapping[str, Config] = {
    "dense": {
        "synthesis_epochs": 2,
        "generator_steps": 3,
        "student_steps": 4,
        "synthetic_batch": 16,
    },
}
_ASYNCHRONOUS = ("fedasync", "fedbuff")
_SYNCHRONOUS_ONLY = (
    "secure_aggregation",
    "record_privacy",
    "client_privacy",
    "attacked",
    "over_selected",
    "population",
)
_MIXED: list[Any] = [
    {"name": "cnn", "width": 2, "norm": "batch"},
    {"name": "mlp", "hidden": [12], "dropout": 0.3},
    "linear",
]
_FAULTS = {
    "before": 0.1,
    "during": 0.1,
    "after": 0.1,
    "lost": 0.1,
    "late": 0.1,
    "twice": 0.1,
    "corrupted": 0.1,
    "delay": 5.0,
}


def cases() -> dict[str, Config]:
    """Return all cases by name: every method, and every variant on each executor in each mode."""
    found = {f"method/{method}": _method(method) for method in METHODS}
    for name, variant in _variants().items():
        modes = ("sync",) if name in _SYNCHRONOUS_ONLY else ("sync", "async")
        for mode in modes:
            for executor in ("serial", "batched", "processes"):
                runtime = {"executor": executor, "mode": mode}
                found[f"{name}/{executor}/{mode}"] = merged(variant, {"runtime": runtime})
    return found


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """Return `base` with `changes` merged in, section by section; neither argument is modified."""
    result = deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if nested else deepcopy(value)
    return result


def _digits(models: Any, **sections: Any) -> Config:
    """Return four clients on digits; keyword arguments are merged into the sections."""
    base: Config = {
        "name": "frozen",
        "rounds": 2,
        "data": {
            "name": "digits",
            "train_limit": 240,
            "test_limit": 40,
            "partition": {"kind": "dirichlet", "alpha": 0.5, "min_size": 20},
            "proxy": {"size": 30},
        },
        "clients": {
            "defaults": {
                "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
                "batch_size": 16,
            },
            "groups": [{"name": "site", "count": 4, "model": models}],
        },
        "runtime": {"threads": 1, "workers": 2},
        "output": {"plots": False, "report": False},
    }
    return merged(base, sections)


def _method(method: str) -> Config:
    """Return a run of three of four clients per round, with a student at the server."""
    return _digits(
        _MIXED,
        clients={"per_round": 3},
        algorithm={"name": method, **_SETTINGS.get(method, {})},
        server={"model": "linear"},
        runtime={
            "executor": "serial",
            "mode": "async" if method in _ASYNCHRONOUS else "sync",
        },
    )


def _variants() -> dict[str, Config]:
    """Return federations that together use the optional features."""
    three = {"per_round": 3}
    hybrid = {"name": "hybrid", "heads": "keep"}
    noise = {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "rdp"}
    return {
        "plain": _digits(
            "cnn_bn_small",
            clients={"defaults": {"augment": {"rotate": 10, "crop": 1, "flip": True}}},
            algorithm={"name": "fedavg"},
        ),
        "heterogeneous": _digits(
            _MIXED, clients=three, algorithm=hybrid, server={"model": "linear"}
        ),
        "class_statistics": _digits(_MIXED, clients=three, algorithm={"name": "fedproto"}),
        "compressed": _digits(
            _MIXED,
            clients=three,
            algorithm=hybrid,
            channel={
                "compress": [{"topk": 0.1}, {"quantize": 8}],
                "compress_down": [{"quantize": 8}],
            },
        ),
        "half_precision": _digits(
            "cnn_gn_small",
            clients=three,
            algorithm={"name": "fedavgm"},
            channel={"compress": ["half"]},
        ),
        "secure_aggregation": _digits(
            _MIXED, clients=three, algorithm=hybrid, channel={"secure_sum": {}}
        ),
        "record_privacy": _digits(
            "cnn_gn_small", algorithm={"name": "fedavg"}, privacy={"unit": "record", **noise}
        ),
        "client_privacy": _digits(
            "cnn_gn_small",
            clients=three,
            algorithm={"name": "fedavg"},
            privacy={"unit": "client", **noise},
        ),
        "attacked": _digits(
            "cnn_gn_small",
            algorithm={"name": "fedavg"},
            attacks={"name": "sign_flip", "share": 0.25},
            aggregation={"rule": "median"},
        ),
        "simulated": _digits(
            _MIXED,
            rounds=3,
            clients=three,
            algorithm=hybrid,
            devices={
                "speed": {"median": 1e6, "sigma": 0.9},
                "up": 1e5,
                "down": 1e6,
                "jitter": 0.3,
            },
            faults=_FAULTS,
        ),
        "over_selected": _digits(
            _MIXED,
            clients={"per_round": 2},
            algorithm={"name": "fedmd"},
            devices={"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5, "down": 1e6},
            cohort={"over_selection": 2, "sampling": "available"},
        ),
        "regression": {
            "name": "frozen",
            "rounds": 1,
            "data": {
                "name": "traffic",
                "series": {"window": 6, "horizons": [1], "test": 0.2, "validation": 0.05},
                "partition": {"kind": "natural"},
                "train_limit": 300,
                "test_limit": 60,
                "proxy": {"size": 30},
            },
            "clients": {
                "defaults": {
                    "steps": 6,
                    "batch_size": 16,
                    "preprocess": {"columns": ["vehicles", "hour_sin", "hour_cos"]},
                },
                "groups": [
                    {"name": "city", "count": 4, "model": [{"name": "gru", "hidden": 8}, "linear"]}
                ],
            },
            "algorithm": hybrid,
            "runtime": {"threads": 1, "workers": 2},
            "output": {"plots": False, "report": False},
        },
        "population": _digits(
            "linear",
            clients={
                "per_round": 8,
                "groups": [{"name": "phone", "count": 200, "model": _MIXED[1]}],
            },
            data={"partition": {"kind": "drawn", "rows": 12, "alpha": 0.3, "min_size": 12}},
            evaluation={"clients": 5},
            algorithm={"name": "scaffold"},
        ),
    }
