"""Workers, the order of groups, interruptions and evaluation do not change a bit of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.federations import METHODS, config
from tests.support.variants import assert_invariant
from tests.support.workers import SharedProcessPool, setup_of, shared_process_pool

pytestmark = pytest.mark.slow
MODELS = [
    {"name": "cnn", "width": 2, "norm": "batch"},
    {"name": "mlp", "hidden": [12], "dropout": 0.3},
    "linear",
]
NOISE = {"noise_multiplier": 1.0, "delta": 1e-4}
SLOW = {"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5, "down": 1e6, "jitter": 0.3}
FAULTS = dict.fromkeys(("before", "during", "after", "lost", "late", "twice", "corrupted"), 0.1)
FEATURES: dict[str, dict[str, Any]] = {
    "compression": {"channel": {"compress": [{"topk": 0.1}, {"quantize": 8}]}},
    "compression downwards": {"channel": {"compress_down": [{"quantize": 8}]}},
    "secure sums": {"channel": {"secure_sum": {}}},
    "private records": {"privacy": {"unit": "record", "accountant": "rdp", **NOISE}},
    "private clients": {"privacy": {"unit": "client", **NOISE}},
    "robust rules": {
        "aggregation": {"rule": "median", "predictions": "agreement"},
        "attacks": {"name": "sign_flip", "share": 0.25},
    },
    "devices": {"devices": SLOW, "faults": {**FAULTS, "delay": 5.0}},
    "augmentation": {"clients__defaults__augment": {"rotate": 10, "crop": 1, "flip": True}},
    "adam": {"clients__defaults__optimizer": {"name": "adam", "lr": 0.01}},
}
OF_HYBRID = ("compression", "devices", "robust rules", "secure sums")
SYNCHRONOUS_ONLY = ("secure sums", "private records", "private clients", "robust rules")


def source(method: str, models: Any = MODELS, **changes: Any) -> dict[str, Any]:
    """Return four clients in groups of their own, three of them per round."""
    groups = [
        {
            "name": f"site_{n}",
            "model": models[n % len(models)] if isinstance(models, list) else models,
            "preprocess": {"normalize": {"mean": 0.1 * n}},
        }
        for n in range(1, 5)
    ]
    small: dict[str, Any] = {
        "data__train_limit": 200,
        "data__proxy__size": 30,
        "data__test_limit": 30,
        "data__partition__min_size": 20,
        "clients__groups": groups,
        "clients__per_round": 3,
        "server": {"model": "linear"},
    }
    return config(method, **{**small, **changes})


@pytest.fixture(scope="module")
def pool() -> Iterator[SharedProcessPool]:
    with shared_process_pool(setup_of(source("local")), 3) as pool:
        yield pool


@pytest.mark.parametrize("method", METHODS)
def test_method_is_invariant(method: str, pool: SharedProcessPool) -> None:
    assert_invariant(source(method), pool, METHODS.index(method))


SETTINGS: dict[str, dict[str, Any]] = {
    "latent features": {"name": "fedgen", "latent_weight": 0.5, "decay": 0.9},
    "proxy rows and weights": {"name": "fedmd", "proxy_rows": 20, "teacher": "entropy"},
    "public and private epochs": {
        "name": "fedmd",
        "initial_phase": True,
        "initial_public_epochs": 2,
        "initial_private_epochs": 2,
    },
    "private epochs": {"name": "kt_pfl", "initial_phase": True},
    "proxy rows": {"name": "hybrid", "proxy_rows": 20},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_method_with_settings_is_invariant(settings: str, pool: SharedProcessPool) -> None:
    algorithm = SETTINGS[settings]
    # Clients first participate in different rounds.
    run = source(algorithm["name"], algorithm=algorithm, rounds=4, data__proxy__labels=True)

    assert_invariant(run, pool, list(SETTINGS).index(settings))


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_is_invariant(feature: str, pool: SharedProcessPool) -> None:
    method = "hybrid" if feature in OF_HYBRID else "fedper"
    models = "cnn_gn_small" if feature in SYNCHRONOUS_ONLY else MODELS
    run = source(method, models, **FEATURES[feature])

    assert_invariant(run, pool, list(FEATURES).index(feature))


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in SYNCHRONOUS_ONLY])
@pytest.mark.parametrize("method", ["hybrid", "fedbuff"])
def test_asynchronous_run_is_invariant(method: str, feature: str, pool: SharedProcessPool) -> None:
    run = source(method, **{**FEATURES["devices"], **FEATURES[feature]}, rounds=3)
    run["runtime"] |= {"mode": "async"} if method == "fedbuff" else {"mode": "async", "buffer": 2}

    assert_invariant(run, pool, list(FEATURES).index(feature))
