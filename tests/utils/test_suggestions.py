"""Suggestions for misspelled words."""

from __future__ import annotations

from pathlib import Path

from hetero_fl.algorithms import register_algorithm
from hetero_fl.cli.commands import APP
from hetero_fl.utils.errors import closest, suggest_file
from tests.support.cases import each_case

PARTITIONS = ["iid", "in_order", "dirichlet", "classes", "quantity", "natural", "drawn"]
OPTIMIZERS = ["sgd", "adam", "adamw"]
METHODS = sorted(register_algorithm)
COMMANDS = list(APP.commands)


@each_case(
    ("found", "choices", "meant"),
    [
        ("non-iid", PARTITIONS, None),  # the opposite
        ("noniid", PARTITIONS, None),
        ("IID", PARTITIONS, "iid"),
        ("iidd", PARTITIONS, "iid"),
        ("in-order", PARTITIONS, "in_order"),
        ("dirichle", PARTITIONS, "dirichlet"),
        ("dirihclte", PARTITIONS, "dirichlet"),
        ("random", PARTITIONS, None),
        ("adma", OPTIMIZERS, "adam"),
        ("adamww", OPTIMIZERS, "adamw"),
        ("rmsprop", OPTIMIZERS, None),
        ("fedvag", METHODS, "fedavg"),
        ("FedAvg", METHODS, "fedavg"),
        ("fedmdd", METHODS, "fedmd"),
        ("hybird", METHODS, "hybrid"),
        ("KT-pFL", METHODS, "kt_pfl"),
        ("lg-fedavg", METHODS, "lg_fedavg"),
        ("x", METHODS, None),
        ("", METHODS, None),
        ("trian", COMMANDS, "train"),
        ("tarin", COMMANDS, "train"),
        ("comapre", COMMANDS, "compare"),
        ("fedrate", COMMANDS, "federate"),
        ("evalute", COMMANDS, "evaluate"),
        ("temprature", ["temperature"], "temperature"),
        ("min_size_", ["min_size", "size"], "min_size"),
        ("lr", ["mu", "lambda"], None),
        ("lrs", ["lr", "momentum"], "lr"),
        ("k", ["x", "y"], None),
        ("client_11", ["client_1", "client_2"], "client_1"),
        ("round", ["rounds", "groups"], "rounds"),
    ],
)
def test_closest_name(found: str, choices: list[str], meant: str | None) -> None:
    assert closest(found, choices) == meant


@each_case(
    ("missing", "meant"),
    [
        ("compse.yaml", "; did you mean 'compose.yaml'?"),
        ("medical_hetro.yaml", "; did you mean 'medical_hetero.yaml'?"),
        ("medical_hetero.yml", "; did you mean 'medical_hetero.yaml'?"),
        ("notes.yaml", ""),
        ("no/compose.yaml", ""),
    ],
)
def test_closest_file_ignores_suffixes(tmp_path: Path, missing: str, meant: str) -> None:
    for name in ("compose.yaml", "medical_hetero.yaml", "notes.txt"):
        (tmp_path / name).touch()

    assert suggest_file(tmp_path / missing, (".yaml", ".yml")) == meant
