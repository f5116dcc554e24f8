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
        ("idi", PARTITIONS, "iid"),
        ("IID", PARTITIONS, "iid"),
        ("iidd", PARTITIONS, "iid"),
        ("in-order", PARTITIONS, "in_order"),
        ("dirichle", PARTITIONS, "dirichlet"),
        ("dirihclte", PARTITIONS, "dirichlet"),
        ("dir", PARTITIONS, "dirichlet"),
        ("dirichlet_split", PARTITIONS, "dirichlet"),
        ("class", PARTITIONS, "classes"),
        ("random", PARTITIONS, None),
        ("sdg", OPTIMIZERS, "sgd"),
        ("adma", OPTIMIZERS, "adam"),
        ("adamww", OPTIMIZERS, "adamw"),
        ("rmsprop", OPTIMIZERS, None),
        ("fedvag", METHODS, "fedavg"),
        ("FedAvg", METHODS, "fedavg"),
        ("fedmdd", METHODS, "fedmd"),
        ("hybird", METHODS, "hybrid"),
        ("KT-pFL", METHODS, "kt_pfl"),
        ("lg-fedavg", METHODS, "lg_fedavg"),
        ("feda", METHODS, None),  # too many begin with it
        ("fedsgd", METHODS, None),
        ("x", METHODS, None),
        ("", METHODS, None),
        ("trian", COMMANDS, "train"),
        ("tarin", COMMANDS, "train"),
        ("comapre", COMMANDS, "compare"),
        ("fedrate", COMMANDS, "federate"),
        ("evalute", COMMANDS, "evaluate"),
        ("run", COMMANDS, None),
        ("temp", ["epochs", "temperature", "step"], "temperature"),
        ("temprature", ["temperature"], "temperature"),
        ("decay", ["lr", "weight_decay"], "weight_decay"),
        ("min_size_", ["min_size", "size"], "min_size"),
        ("lr", ["mu", "lambda"], None),
        ("lrs", ["lr", "momentum"], "lr"),
        ("k", ["x", "y"], None),
        ("median", ["mean"], None),
        ("client_11", ["client_1", "client_2"], "client_1"),
        ("bb", ["a", "b"], "b"),
        # Fewer edits come first, then the same letters.
        ("round", ["rounds", "groups"], "rounds"),
        ("paht", ["pact", "path"], "path"),
    ],
)
def test_closest_name(found: str, choices: list[str], meant: str | None) -> None:
    assert closest(found, choices) == meant


@each_case(
    ("missing", "meant"),
    [
        ("nope.yaml", ""),  # only the suffix is that of compose.yaml
        ("compse.yaml", "; did you mean 'compose.yaml'?"),
        ("medical_hetro.yaml", "; did you mean 'medical_hetero.yaml'?"),
        ("medical_hetero.yml", "; did you mean 'medical_hetero.yaml'?"),
        ("medical.yaml", "; did you mean 'medical_hetero.yaml'?"),
        ("notes.yaml", ""),
        ("no/compose.yaml", ""),
    ],
)
def test_closest_file_ignores_suffixes(tmp_path: Path, missing: str, meant: str) -> None:
    for name in ("compose.yaml", "medical_hetero.yaml", "notes.txt"):
        (tmp_path / name).touch()

    assert suggest_file(tmp_path / missing, (".yaml", ".yml")) == meant
