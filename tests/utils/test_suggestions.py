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
NAMES = {
    "partition": PARTITIONS,
    "optimizer": OPTIMIZERS,
    "method": METHODS,
    "command": list(APP.commands),
}


@each_case(
    ("of", "found", "meant"),
    [
        ("partition", "non-iid", None),  # the opposite
        ("partition", "noniid", None),
        ("partition", "idi", "iid"),
        ("partition", "IID", "iid"),
        ("partition", "iidd", "iid"),
        ("partition", "in-order", "in_order"),
        ("partition", "dirichle", "dirichlet"),
        ("partition", "dirihclte", "dirichlet"),
        ("partition", "dir", "dirichlet"),
        ("partition", "dirichlet_split", "dirichlet"),
        ("partition", "class", "classes"),
        ("partition", "random", None),
        ("optimizer", "sdg", "sgd"),
        ("optimizer", "adma", "adam"),
        ("optimizer", "adamww", "adamw"),
        ("optimizer", "rmsprop", None),
        ("method", "fedvag", "fedavg"),
        ("method", "FedAvg", "fedavg"),
        ("method", "fedmdd", "fedmd"),
        ("method", "hybird", "hybrid"),
        ("method", "KT-pFL", "kt_pfl"),
        ("method", "lg-fedavg", "lg_fedavg"),
        ("method", "feda", None),  # too many begin with it
        ("method", "fedsgd", None),
        ("method", "x", None),
        ("method", "", None),
        ("command", "trian", "train"),
        ("command", "tarin", "train"),
        ("command", "comapre", "compare"),
        ("command", "cert", "certificates"),
        ("command", "evalute", "evaluate"),
        ("command", "run", None),
    ],
)
def test_closest_name(of: str, found: str, meant: str | None) -> None:
    assert closest(found, NAMES[of]) == meant


@each_case(
    ("found", "choices", "meant"),
    [
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
def test_closest_key(found: str, choices: list[str], meant: str | None) -> None:
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
    ],
)
def test_closest_file_ignores_suffixes(tmp_path: Path, missing: str, meant: str) -> None:
    for name in ("compose.yaml", "medical_hetero.yaml", "notes.txt"):
        (tmp_path / name).touch()

    assert suggest_file(tmp_path / missing, (".yaml", ".yml")) == meant


def test_closest_file_of_a_missing_folder_is_empty(tmp_path: Path) -> None:
    assert suggest_file(tmp_path / "no" / "file.yaml") == ""
