"""Every method computes the same as a plain loop, in float64, for the settings that matter."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest

from hetero_fl.experiment import prepare
from tests.references.loops import REFERENCES, asynchronous
from tests.references.loops.base import READ, Loop
from tests.support import asynchronous_runs
from tests.support.federations import METHODS, config

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-9
BN = {"name": "cnn", "width": 4, "norm": "batch"}
MLP = {"name": "mlp", "hidden": [12]}
GN = {"name": "cnn", "width": 4, "norm": "group"}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
# Rows are unequal, and some clients lack classes.
DATA = {
    "data__train_limit": 260,
    "data__test_limit": 30,
    "data__proxy__size": 36,
    "data__partition": {"kind": "dirichlet", "alpha": 0.3, "min_size": 20},
}
# Clients with other preprocessing, and clients that share less.
VIEWS = [
    {"match": f"site_{n}", "preprocess": {"normalize": {"mean": mean, "std": std}}}
    for n, mean, std in ((2, 0.3, 0.2), (3, 0.1, 0.5))
]
PREDICTIONS_ONLY = {"match": "site_4", "shares": ["predictions", "statistics"]}
BACKBONE_ONLY = {"match": "site_2", "shares": ["backbone", "predictions"]}
ADJUSTED = {"logit_adjustment": True}
CORRECTED = {"prior_correction": True}
SOME = {"clients__per_round": 3, "rounds": 3}
# Clients take unequal numbers of steps.
SHORT = {"clients__defaults__batch_size": 6}
ALONE = {"clients__per_round": 1, "rounds": 4}
UNIFORM = {"weighting": "uniform", "server_lr": 0.7}
PLAIN = {
    "logit_adjustment": False,
    "recalibrate": [],
    "teacher": "mean",
    "align": 0.0,
    "replay_weight": 0.0,
}
# Predictions confident enough that logarithms of probabilities are clipped at -8.
CONFIDENT = {"clients__defaults__epochs": 6, "clients__defaults__optimizer__lr": 0.2}
SERVER = {"server_epochs": 3, "server_lr": 0.05, "server_batch_size": 7}
SMALL = {"mentee": {"name": "cnn", "width": 2, "norm": "batch", "feature_dim": 5}}
FEW = {"synthesis_epochs": 2, "generator_steps": 3, "student_steps": 4, "synthetic_batch": 12}
# Settings besides the defaults. Keys without `__` are settings of the method.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "local": [{**ADJUSTED, "clients__defaults__epochs": 2}, CORRECTED],
    "ensemble": [{**ADJUSTED, "clients__overrides": VIEWS}, CORRECTED],
    "centralized": [
        {**ADJUSTED, "clients__overrides": VIEWS, "clients__defaults__epochs": 2},
        {
            "each_architecture": True,
            "clients__overrides": VIEWS,
            "clients__defaults__optimizer": {**SGD, "schedule": "linear", "gamma": 0.4},
        },
    ],
    "fedavg": [
        {**ADJUSTED, **SOME, **UNIFORM},
        {**SOME, "weighting": "sum", "server_lr": 0.4},
        {"clients__overrides": [BACKBONE_ONLY, PREDICTIONS_ONLY], "server_lr": 1.7},
    ],
    "fedavg_ft": [{**ADJUSTED, "fine_tune_epochs": 2, "clients__overrides": VIEWS}],
    "fedlc": [{"tau": 0.4, "denominator": "all"}],
    "fedprox": [{**ADJUSTED, **UNIFORM, "mu": 0.4}],
    "fednova": [
        {**ADJUSTED, **SOME, **SHORT},
        {**SOME, **UNIFORM, "clients__defaults__steps": 5},
        {**SHORT, "clients__defaults__optimizer__nesterov": True},
    ],
    "fedavgm": [{**ADJUSTED, **ALONE, "momentum": 0.8, "server_lr": 1.7}],
    "fedadam": [
        {**ALONE, "beta1": 0.8, "beta2": 0.6, "tau": 0.01, "server_lr": 0.05},
        {**ADJUSTED, "weighting": "uniform"},
    ],
    "fedyogi": [{**ADJUSTED, **ALONE, "beta1": 0.8, "beta2": 0.6, "tau": 0.01, "server_lr": 0.05}],
    "scaffold": [{**ADJUSTED, **SOME, **UNIFORM}, SOME],
    "fedasync": [{**ADJUSTED, "alpha": 0.7, "rho": 0.3, "staleness": "constant"}],
    "fedbuff": [{**ADJUSTED, "buffer": 3, "server_lr": 0.8, "staleness": "hinge", "b": 0}],
    "fedbn": [{**ADJUSTED, **SOME}, {"keep": "statistics", "server_lr": 0.7}],
    "fedper": [{**ADJUSTED, **SOME, "server_lr": 0.7}, CORRECTED],
    "lg_fedavg": [{**ADJUSTED, **SOME, "weighting": "uniform"}],
    "fedrep": [
        {**ADJUSTED, **SOME, "head_epochs": 3, "body_epochs": 2},
        {"clients__defaults__steps": 7},
        {**CORRECTED, "clients__defaults__epochs": 2},
    ],
    "fedbabu": [{**ADJUSTED, "finetune": "head", "fine_tune_epochs": 2}],
    "ditto": [{**ADJUSTED, **SOME, "weight": 0.3, "personal_epochs": 2}],
    "heterofl": [
        {**ADJUSTED, **SOME, "models": [{**BN, "width": width} for width in (8, 4, 2)]},
        {
            **SOME,
            "weighting": "samples",
            "masked": True,
            "models": [{**GN, "width": width} for width in (8, 4, 2)],
            "clients__overrides": [{"match": "site_2", "shares": ["parameters"]}],
        },
    ],
    "fedmd": [
        {**SOME, "distance": "mae", "proxy_rows": 25, "teacher": "entropy", "digest_epochs": 2},
        {**ADJUSTED, "teacher": "contrast", "align": 0.5, "temperature": 3.0, **CONFIDENT},
        {"teacher": "samples", "align": 1.0, "sharpen": "power", "beta": 1.7},
        {**CORRECTED, "align": 0.5, "recalibrate": ["proxy_predictions"]},
        {
            **SOME,
            "clients__per_round": 2,
            "initial_phase": True,
            "initial_public_epochs": 3,
            "initial_private_epochs": 2,
            "data__proxy__labels": True,
        },
    ],
    "feddf": [
        {"temperature": 2.5, "distill_epochs": 3, "proxy_batch_size": 15, "proxy_rows": 30},
        {
            "teacher": "contrast",
            "clients__overrides": [*VIEWS, PREDICTIONS_ONLY],
            **CONFIDENT,
        },
        {
            **ADJUSTED,
            **SOME,
            "teacher": "samples",
            "align": 0.5,
            "sharpen": "era",
            "distilled_statistics": "clients",
        },
        {
            **CORRECTED,
            "teacher": "entropy",
            "recalibrate": ["proxy_predictions"],
            "clients__overrides": VIEWS,
        },
    ],
    "ds_fl": [
        {**SOME, "sharpen": "power", "beta": 1.7, "teacher": "samples", "proxy_rows": 25},
        {"sharpen": "none", "teacher": "entropy", "distill_epochs": 2},
        {**ADJUSTED, "teacher": "contrast", "align": 0.5, "era_temperature": 0.2},
        {"align": 0.5, "temperature": 2.0, **CORRECTED},
        {"teacher": "contrast", "sharpen": "none", "recalibrate": ["proxy_predictions"]},
    ],
    "kt_pfl": [
        {
            "clients__per_round": 2,
            "rounds": 3,
            "rho": 0.4,
            "coefficient_lr": 0.2,
            "coefficient_steps": 3,
            "temperature": 3.0,
        },
        {"coefficient_steps": 0, "recalibrate": ["proxy_predictions"], **CORRECTED},
        {
            **ADJUSTED,
            "proxy_rows": 25,
            "digest_epochs": 2,
            "initial_phase": True,
            "initial_private_epochs": 2,
        },
    ],
    "hybrid": [
        {
            "align": 0.0,
            "recalibrate": [],
            "distill_at": "both",
            "heads": "keep",
            "replay_weight": 0.7,
            "clients__overrides": [BACKBONE_ONLY],
            **CONFIDENT,
        },
        {"distill_at": "client", "digest_epochs": 2, "proxy_rows": 30, **PLAIN, **CORRECTED},
        {
            **SOME,
            "distill_epochs": 1,
            "distill_rounds": 2,
            "proxy_batch_size": 15,
            "clients__overrides": [
                *VIEWS,
                {"match": "site_1", "shares": ["parameters", "predictions"]},
            ],
        },
        {"teacher": "mean", "align": 0.3, "distilled_statistics": "clients", "temperature": 3.0},
    ],
    "fd": [
        CORRECTED,
        # Some classes of a client have no teacher.
        {**ALONE, "weight": 0.6, "temperature": 2.5},
        {**ADJUSTED, "teacher": "contrast", **CONFIDENT},
    ],
    "fedproto": [
        {**ADJUSTED, **SOME, "weight": 0.7},
        {"inference": "own"},
        {**ADJUSTED, "inference": "head"},
        {**CORRECTED, "inference": "head"},
    ],
    "fedtgp": [
        {**ADJUSTED, **SOME, **SERVER, "margin": 0.05, "weight": 0.7},
        {**SERVER, "margin": 100.0},
    ],
    "fedgh": [{**ADJUSTED, **SOME, **SERVER}],
    "fedgkt": [
        {
            **ADJUSTED,
            # Clients return after rounds without them.
            "clients__per_round": 2,
            "rounds": 6,
            "temperature": 2.5,
            "weight": 0.6,
            "large_model": {"name": "mlp", "hidden": [20]},
            "server_epochs": 3,
            "server_batch_size": 50,
        },
        {"inference": "client", **CORRECTED, "server__optimizer": {"name": "adam", "lr": 0.002}},
    ],
    "fedgen": [
        {
            **ADJUSTED,
            "rounds": 3,
            "weight": 0.6,
            "latent_weight": 0.4,
            "decay": 0.5,
            "diversity": 0.8,
            "generator_lr": 0.01,
            "generator_batch_size": 6,
            "noise_dim": 3,
        },
        {**SOME, "generator_hidden": 20},
    ],
    "fml": [{**SMALL, **SOME, "alpha": 0.6, "beta": 0.3, **ADJUSTED}],
    "fedkd": [
        {**SMALL, "energy_start": 0.5, "energy_end": 0.8, "hidden_weight": 0.9, "rounds": 3},
        {**ADJUSTED, **SOME, "mentee": {"name": "mlp", "hidden": [30, 20]}},
    ],
    "fedmrl": [{**ADJUSTED, **SMALL, **SOME, "own_weight": 0.8, "mentee_weight": 0.4}, CORRECTED],
    "dense": [
        {
            **ADJUSTED,
            **FEW,
            "student": "site_2",
            "noise": 5,
            "statistics_weight": 0.7,
            "adversarial_weight": 0.3,
            "temperature": 3.0,
            "generator_lr": 0.01,
            "clients__overrides": VIEWS,
        },
    ],
}


def source(
    method: str, models: Any = (BN, MLP), clients: int = 4, **settings: Any
) -> dict[str, Any]:
    """Return a configuration; keys without `__` are settings of the method."""
    changes = {
        key if "__" in key or key == "rounds" else f"algorithm__{key}": value
        for key, value in settings.items()
    }
    return config(method, list(models), clients, **{**DATA, "server__optimizer": SGD, **changes})


def assert_equal_rounds(loop: Loop, trainer: Any) -> None:
    """Run all rounds of both and compare losses, scores and the server's models."""
    for index in range(trainer.federation.num_rounds):
        record = trainer.run_round()
        loop.round(record["cohort"])
        place = f"round {index + 1}"

        assert record["train_loss"] == pytest.approx(loop.losses[-1], abs=TOLERANCE), place
        evaluations = trainer.evaluate().clients
        found = {
            (client_id, name): evaluations[client_id].scores[name]["loss"]
            for client_id, name in loop.scores[-1]
        }
        assert len(found) == len(evaluations) * len(READ)
        assert found == pytest.approx(loop.scores[-1], abs=TOLERANCE), place
        for slot, state in loop.server_models().items():
            for name, tensor in state.items():
                far = float((trainer.server.models[slot][name] - tensor).abs().max())
                assert far < TOLERANCE, f"{place}: {slot}, {name}"


def assert_equals_reference(source: dict[str, Any]) -> None:
    prepared = prepare(source)
    loop = REFERENCES[source["algorithm"]["name"]](prepared)
    assert_equal_rounds(loop, prepared.make_trainer())


def test_every_method_has_a_reference() -> None:
    assert sorted(REFERENCES) == METHODS == sorted(SETTINGS)


@pytest.mark.parametrize("method", METHODS)
def test_method_matches_reference(method: str, subtests: pytest.Subtests) -> None:
    for settings in ({}, *SETTINGS[method]):
        with subtests.test(settings=settings):
            assert_equals_reference(source(method, **settings))


# No two tasks end at the same time.
SECONDS = {"site_1": 1.0, "site_2": math.e, "site_3": 2 * math.pi, "site_4": 3.5}


def test_staleness_matches_reference(subtests: pytest.Subtests) -> None:
    cases: list[dict[str, Any]] = [
        {"name": "fedasync", "staleness": "constant"},
        {"name": "fedasync", "alpha": 0.7},
        {"name": "fedasync", "staleness": "hinge", "b": 1},
        {"name": "fedbuff", "buffer": 1},
        {"name": "fedbuff", "buffer": 2, "server_lr": 0.8},
        # Some clients train twice on a version.
        {"name": "fedbuff", "buffer": 5, "staleness": "hinge", "b": 0, "a": 2.0},
    ]
    for algorithm in cases:
        with subtests.test(algorithm=algorithm):
            run = source(algorithm["name"], rounds=3) | {"algorithm": algorithm}
            trainer = asynchronous_runs.session(run, seconds=lambda client, _: SECONDS[client])
            loop = REFERENCES[algorithm["name"]](prepare(run))
            assert isinstance(loop, asynchronous.FedAsync)
            loop.seconds = list(SECONDS.values())
            assert_equal_rounds(loop, trainer)


# Settings with which a method must equal another, and settings with which it must not.
# Each entry: the parts that are equal, both settings, and changes that make a difference.
ALL = ("losses", "personal", "global")
ONE = {"models": [BN], "clients": 1}
ONE_GN = {"models": [GN], "clients": 1}
WIDE = {"models": [{**BN, "feature_dim": 12}, {**MLP, "feature_dim": 12}]}
WHOLE = {"clients__defaults__batch_size": 500}
BACKBONES = {"clients__defaults__shares": ["backbone", "predictions", "statistics"]}
IID = {"data__partition": {"kind": "iid"}, "models": [BN], "clients": 2}
FEDDF = {**ADJUSTED, "recalibrate": ["proxy_predictions", "local_test"], "teacher": "contrast"}
Case = tuple[tuple[str, ...], dict[str, Any], dict[str, Any], dict[str, Any]]
LIMITS: list[Case] = [
    (ALL, {"name": "fedprox", "mu": 0.0}, {"name": "fedavg"}, {"mu": 0.5}),
    (ALL, {"name": "fedavgm", "momentum": 0.0}, {"name": "fedavg"}, {"momentum": 0.5}),
    (
        ALL,
        {"name": "fednova", "clients__defaults__steps": 3},
        {"name": "fedavg", "clients__defaults__steps": 3},
        {"clients__defaults__steps": None},
    ),
    (
        ALL,
        {"name": "scaffold", "rounds": 1},
        {"name": "fedavg", "rounds": 1},
        {"server_lr": 0.5},
    ),
    (ALL, {"name": "scaffold", **ONE}, {"name": "fedavg", **ONE}, {"clients": 2}),
    (
        ("personal", "global"),
        {"name": "centralized", **ONE},
        {"name": "fedavg", **ONE},
        {"clients": 2},
    ),
    (ALL, {"name": "ensemble", **ONE}, {"name": "local", **ONE}, {"clients": 2}),
    (
        ALL,
        {"name": "fedbn", "models": [GN, MLP]},
        {"name": "fedavg", "models": [GN, MLP]},
        {"models": [BN, MLP]},
    ),
    (
        ALL,
        {"name": "fedlc", "tau": 0.0, "denominator": "all", **IID},
        {"name": "fedavg", **IID},
        {"tau": 0.1},
    ),
    (("global",), {"name": "ditto"}, {"name": "fedavg"}, {"weighting": "uniform"}),
    (
        # The personal model draws other batches, so a batch has all rows.
        ("personal",),
        {"name": "ditto", "weight": 0.0, **WHOLE},
        {"name": "local", **WHOLE},
        {"weight": 1.0},
    ),
    (
        ALL,
        {"name": "heterofl", "models": [GN], "weighting": "samples"},
        {"name": "fedavg", "models": [GN]},
        {"models": [{**GN, "width": 8}, {**GN, "width": 4}]},
    ),
    (ALL, {"name": "fedper"}, {"name": "fedavg", **BACKBONES}, {"server_lr": 0.5}),
    (ALL, {"name": "fd", "weight": 0.0}, {"name": "local"}, {"weight": 1.0}),
    (
        ALL,
        {"name": "fedproto", "weight": 0.0, "inference": "head", **WIDE},
        {"name": "local", **WIDE},
        {"weight": 1.0},
    ),
    (
        ALL,
        {"name": "fedgkt", "weight": 0.0, "inference": "client", **WIDE},
        {"name": "local", **WIDE},
        {"weight": 1.0},
    ),
    (ALL, {"name": "fedgen", "weight": 0.0, **WIDE}, {"name": "fedavg", **WIDE}, {"weight": 1.0}),
    (("personal",), {"name": "fml", "alpha": 1.0}, {"name": "local"}, {"alpha": 0.5}),
    (
        ("global",),
        {"name": "fml", "beta": 1.0, "mentee": BN},
        {"name": "fedavg", "models": [BN]},
        {"beta": 0.5},
    ),
    (ALL, {"name": "feddf", **ONE_GN}, {"name": "fedavg", **ONE_GN}, {"clients": 2}),
    (ALL, {"name": "fedmd", **ONE_GN}, {"name": "local", **ONE_GN}, {"clients": 2}),
    (
        ALL,
        {"name": "hybrid", "data__proxy__size": 0, **PLAIN},
        {"name": "fedavg", "data__proxy__size": 0},
        ADJUSTED,
    ),
    (
        ("losses",),
        {"name": "hybrid", **PLAIN, "distill_at": "client", "clients": 2},
        {"name": "fedmd", "clients": 2},
        {"distill_at": "server"},
    ),
    (
        ALL,
        {"name": "hybrid", "replay_weight": 0.0, **SOME},
        {"name": "feddf", **FEDDF, "align": 1.0, "distill_epochs": 3, **SOME},
        {"replay_weight": 0.5},
    ),
]


def outcome(settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Return losses, and scores by name, of each client and round."""
    return _outcome(json.dumps(settings, sort_keys=True))


@cache
def _outcome(settings: str) -> dict[str, list[Any]]:
    own = json.loads(settings)
    trainer = prepare(source(own.pop("name"), **own)).make_trainer()
    found: dict[str, list[Any]] = {part: [] for part in ALL}
    for _ in range(trainer.federation.num_rounds):
        found["losses"] += trainer.run_round()["train_loss"].values()
        for evaluation in trainer.evaluate().clients.values():
            for part in ("personal", "global"):
                found[part].append(evaluation.scores[part]["loss"])
    return found


def test_limits_equal_other_methods(subtests: pytest.Subtests) -> None:
    for parts, settings, other, change in LIMITS:
        with subtests.test(settings=settings, other=other):
            actual, expected = outcome(settings), outcome(other)
            differs = outcome({**settings, **change})

            for part in parts:
                assert actual[part] == pytest.approx(expected[part], abs=TOLERANCE), part
            assert any(differs[part] != pytest.approx(actual[part], abs=1e-6) for part in parts)
