"""Partitioners of `flwr-datasets`, selected by class name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import hetero_fl as hfl
from hetero_fl.config.data import DataConfig, PartitionConfig
from hetero_fl.core.task import Task
from hetero_fl.data import federate, partition_rows
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import PLAIN_CLIENT, numbered, rows_of
from tests.support.mistakes import check_refused, refusal

pytestmark = pytest.mark.filterwarnings("ignore:::flwr_datasets")
partitioner = pytest.importorskip(
    "flwr_datasets.partitioner", reason="pip install 'hetero_fl[flower-datasets]'"
)

FOUR = Task("multiclass", 4, ("a", "b", "c", "d"))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ContinuousPartitioner": {"partition_by": "time", "strictness": 0.8},
    "DirichletPartitioner": {"partition_by": "label", "alpha": 0.3},
    "DistributionPartitioner": {
        "partition_by": "label",
        "distribution_array": [[1, 2], [3, 4], [1, 1], [2, 2]],
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 5,
    },
    "ExponentialPartitioner": {},
    "GroupedNaturalIdPartitioner": {"partition_by": "group", "group_size": 2},
    "IdToSizeFncPartitioner": {"partition_id_to_size_fn": "python:numpy_sizes:sizes"},
    "IidPartitioner": {},
    "InnerDirichletPartitioner": {
        "partition_by": "label",
        "alpha": 1.0,
        "partition_sizes": [20, 30, 40, 30],
    },
    "LinearPartitioner": {},
    "NaturalIdPartitioner": {"partition_by": "hospital"},
    "PathologicalPartitioner": {"partition_by": "label", "num_classes_per_partition": 2},
    "ShardPartitioner": {"partition_by": "label", "num_shards_per_partition": 2},
    "SizePartitioner": {"partition_sizes": [10, 20, 30, 40]},
    "SquarePartitioner": {},
}


def dataset(rows: int = 500) -> Any:
    y = np.arange(rows) % 4
    hospital = np.array(["east", "north", "south", "west"])[np.arange(rows) // 7 % 4]
    return hfl.from_arrays(
        np.arange(rows, dtype="float32")[:, None],
        np.array(["a", "b", "c", "d"])[y],
        test=(np.zeros((4, 1), dtype="float32"), list("abcd")),
        group=np.arange(rows) % 8,
        metadata={"hospital": hospital, "time": np.arange(rows)},
    )


def divide(kind: str, clients: int = 4, seed: int = 0, **arguments: Any) -> list[torch.Tensor]:
    config = PartitionConfig(kind=kind, min_size=1, **arguments)
    names = [f"client_{i}" for i in range(clients)]
    shares = hfl.split(dataset(), names, config, model="mlp", seed=seed)
    return [client.data.train.x[:, 0].long() for client in shares]


def test_table_of_arguments_is_complete() -> None:
    classes = {
        name
        for name, found in vars(partitioner).items()
        if isinstance(found, type) and not inspect.isabstract(found)
    }
    assert classes - {name for name in classes if name.startswith("Vertical")} == set(ARGUMENTS)


@each_case("name", sorted(ARGUMENTS))
def test_every_partitioner(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "numpy_sizes.py").write_text("def sizes(partition_id):\n    return partition_id\n")
    monkeypatch.chdir(tmp_path)

    parts = divide(f"flwr:{name}", **ARGUMENTS[name])

    rows = torch.cat(parts)
    assert len(parts) == 4 and len(rows.unique()) == len(rows)
    assert all(len(part) for part in parts)
    again = divide(f"flwr:{name}", **ARGUMENTS[name])
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert capfd.readouterr() == ("", "")


def test_partition_depends_on_the_seed() -> None:
    for name in ("IidPartitioner", "DirichletPartitioner"):
        first, second = (divide(f"flwr:{name}", seed=seed, **ARGUMENTS[name]) for seed in (0, 1))
        assert any(
            len(a) != len(b) or not torch.equal(a, b) for a, b in zip(first, second, strict=True)
        )


def test_rows_are_shuffled_first() -> None:
    """Sorted rows would give partitions of one class each."""
    y = torch.arange(400) // 100
    config = PartitionConfig(kind="flwr:IidPartitioner")
    parts = partition_rows(y, None, config, [1] * 4, FOUR, seed=0)
    assert all(len(y[part].unique()) == 4 for part in parts)


def test_dirichlet_is_that_of_flower() -> None:
    """The partition of class counts equals a direct call with the same rows and seed."""
    y = torch.arange(400) % 4
    config = PartitionConfig(
        kind="flwr:DirichletPartitioner", alpha=0.5, partition_by="label", seed=7, min_size=1
    )
    parts = partition_rows(y, None, config, [1] * 3, Task("multiclass", 4), seed=0)
    direct = partitioner.DirichletPartitioner(3, "label", 0.5, min_partition_size=1, seed=7)
    from datasets import Dataset

    direct.dataset = Dataset.from_dict({"label": y.tolist()})
    for k, part in enumerate(parts):
        expected = torch.bincount(
            torch.tensor(list(direct.load_partition(k)["label"])), minlength=4
        )
        assert torch.equal(torch.bincount(y[part], minlength=4), expected)


def test_natural_partition_by_a_column() -> None:
    """Values of the column are matched with the client ids by name."""
    config = DataConfig(
        partition={"kind": "flwr:NaturalIdPartitioner", "partition_by": "hospital", "min_size": 5}
    )
    source = dataset()
    names = ["west", "south", "north", "east"]
    data = federate(source, config, dict.fromkeys(names, PLAIN_CLIENT), seed=0)
    for name in names:
        for split in ("train", "test"):
            share = data.client_rows[name][split]
            x = share.examples.x[share.rows][:, 0].long()
            assert set(source.train.metadata["hospital"][x.numpy()]) == {name}
    # In this call, the order of the clients is not that of the values.
    for client in hfl.split(source, names, config.partition, model="mlp"):
        assert set(client.data.train.metadata["hospital"]) == {client.name}
    other = federate(source, config, dict.fromkeys("abcd", PLAIN_CLIENT), seed=0)
    assert "no client has the name of a group; 'a' gets 'east'" in other.notes[-1]
    check_refused(
        "no group for client 'est'; did you mean 'east'",
        federate,
        source,
        config,
        dict.fromkeys(["est", *names[:3]], PLAIN_CLIENT),
        seed=0,
    )


def test_patients_are_not_divided() -> None:
    source = numbered(patient=[i // 5 for i in range(200)])
    config = DataConfig(
        partition={"kind": "flwr:DirichletPartitioner", "alpha": 1, "partition_by": "label"}
    )
    data = federate(source, config, dict.fromkeys("ab", PLAIN_CLIENT), seed=0)
    patients = [
        {row // 5 for split in ("train", "validation", "test") for row in rows_of(data, c, split)}
        for c in "ab"
    ]
    assert patients[0] and patients[1] and not patients[0] & patients[1]


def test_run_from_a_configuration(tmp_path: Path) -> None:
    """Arguments are keys of the configuration, and the saved configuration is the same."""
    config = {
        "rounds": 1,
        "data": {
            "name": "digits",
            "partition": {"kind": "flwr:DirichletPartitioner", "alpha": 9, "partition_by": "label"},
        },
        "clients": {"groups": [{"name": "site", "count": 3, "model": "linear"}]},
        "algorithm": {"name": "fedavg"},
        "runtime": {"executor": "serial", "threads": 1},
    }
    overrides = ["data.partition.alpha=0.7", "data.partition.self_balancing=true"]

    run = hfl.run(config, overrides=overrides, out=tmp_path / "run", quiet=True)

    assert run.summary["rounds_completed"] == 1
    saved = hfl.load_config(tmp_path / "run" / "config.yaml")
    assert saved.data.partition.arguments == {
        "alpha": 0.7,
        "partition_by": "label",
        "self_balancing": True,
    }
    changed = hfl.load_config(tmp_path / "run" / "config.yaml", ["data.partition.alpha=0.2"])
    assert (changed.data.partition.arguments or {})["alpha"] == 0.2


@each_case(
    ("kind", "arguments", "message"),
    (
        ("DirichletPartitoner", {}, "did you mean 'DirichletPartitioner'?"),
        ("", {}, "choose from ContinuousPartitioner, DirichletPartitioner"),
        ("VerticalEvenPartitioner", {}, "divides columns instead of rows"),
        (
            "DirichletPartitioner",
            {"alpha": 1, "partitionby": "label"},
            "data.partition.partitionby: unknown argument of flwr:DirichletPartitioner; did you "
            "mean 'partition_by'?",
        ),
        ("DirichletPartitioner", {"alpha": 1}, "data.partition.partition_by: missing"),
        (
            "DirichletPartitioner",
            {"alpha": 1, "partition_by": "hospitl"},
            "data.partition.partition_by: no column 'hospitl'; did you mean 'hospital'?",
        ),
        ("IidPartitioner", {"num_partitions": 5}, "num_partitions: must be 4, the number of"),
        ("IidPartitioner", {"num_partitons": 4}, "did you mean 'num_partitions'?"),
        ("SizePartitioner", {"partition_sizes": [9, 9]}, "got 2 partitions for 4 clients"),
        ("SizePartitioner", {"partition_sizes": 3}, "ValueError: Partition sizes must be"),
        (
            "DirichletPartitioner",
            {"alpha": 0.01, "partition_by": "label", "min_partition_size": 15},
            "data.partition.kind=dirichlet moves rows instead",
        ),
        (
            "GroupedNaturalIdPartitioner",
            {"partition_by": "group", "group_size": 3},
            "got 3 partitions for 4 clients",
        ),
        (
            "DistributionPartitioner",
            ARGUMENTS["DistributionPartitioner"] | {"distribution_array": [[1], ["x"]]},
            "distribution_array: expected a list of rows of numbers",
        ),
    ),
)
def test_mistakes_are_one_line(kind: str, arguments: Any, message: str) -> None:
    caught = refusal(divide, f"flwr:{kind}", **arguments)
    assert message in caught
    assert caught.startswith("data.partition.")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flwr_datasets", None)
    check_refused(r"pip install 'hetero_fl\[flower-datasets\]'", divide, "flwr:IidPartitioner")


VALUES = st.none() | st.booleans() | st.integers(-3, 600) | st.floats() | st.text(max_size=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(ARGUMENTS)),
    key=st.sampled_from(
        ["alpha", "partition_by", "partition_sizes", "strictness", "seed", "shuffle", "group_size"]
    ),
    value=VALUES | st.lists(VALUES, max_size=4),
)
def test_malformed_arguments_are_one_line(name: str, key: str, value: Any) -> None:
    arguments = {**ARGUMENTS[name], key: value}
    try:
        parts = divide(f"flwr:{name}", **arguments)
    except UserError as error:
        assert str(error).startswith("data.partition") and "\n" not in str(error)
    else:
        assert len(parts) == 4
