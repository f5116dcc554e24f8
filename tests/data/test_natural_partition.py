"""Natural partitions: groups and the clients of the same name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig, PartitionConfig, SourceConfig
from hetero_fl.data import federate, load_source
from hetero_fl.utils.text import Caution
from tests.support.federated_data import PLAIN_CLIENT, numbered, rows_of
from tests.support.mistakes import check_refused

NATURAL = DataConfig(partition=PartitionConfig(kind="natural"))


def test_clients_of_other_names_get_groups_in_order() -> None:
    dataset = numbered(groups=[("east", "north", "south")[i % 3] for i in range(200)])
    other = federate(dataset, NATURAL, dict.fromkeys(("c_1", "c_2", "c_3"), PLAIN_CLIENT), 0)
    assert other.notes == [
        (
            "arrays: no client has the name of a group; 'c_1' gets "
            "'east', 'c_2' gets 'north', 'c_3' gets 'south'"
        )
    ]
    assert all(row % 3 == 0 for row in rows_of(other, "c_1", "train"))
    full = federate(dataset, NATURAL, {"all": PLAIN_CLIENT}, 0)
    assert full.notes == [
        "arrays: client 'all' gets the rows of all groups: 'east', 'north', 'south'"
    ]
    assert not federate(
        dataset, DataConfig(), {"est": PLAIN_CLIENT, "north": PLAIN_CLIENT}, 0
    ).notes


def test_group_without_training_rows_is_named() -> None:
    """Refuse a group whose ten rows leave no training rows."""
    dataset = numbered(groups=["east"] * 100 + ["north"] * 90 + ["south"] * 10)
    assert dataset.train.group_names == ("east", "north", "south")
    dataset = replace(
        dataset,
        train=dataset.train.select_rows(torch.arange(190)),
        test=dataset.train.select_rows(torch.arange(150, 200)),
    )
    check_refused(
        "3 groups for 2 clients in arrays: no client for group 'south'",
        federate,
        dataset,
        NATURAL,
        dict.fromkeys(("east", "north"), PLAIN_CLIENT),
        0,
    )
    check_refused(
        "natural: group 'south' of arrays has no training rows left",
        federate,
        dataset,
        NATURAL,
        dict.fromkeys(("east", "north", "south"), PLAIN_CLIENT),
        0,
    )
    full = federate(dataset, NATURAL, {"all": PLAIN_CLIENT}, 0)
    assert (
        "arrays: client 'all' gets the rows of all groups: 'east', 'north', 'south'" in full.notes
    )


def test_labels_of_all_files_are_matched(tmp_path: Path) -> None:
    """Match labels in different spellings: 0 and 0.0, " Yes" and "Yes"."""
    base = pd.DataFrame({"u": range(90), "v": [-i for i in range(90)]})
    for common, local, names in (
        ([0, 1] * 45, [0.0, 1.0] * 45, ("0", "1")),
        ([0.0, 1.0] * 45, ["0 ", " 1.0"] * 45, ("0", "1")),
        (["No", "Yes"] * 45, ["No ", " Yes"] * 45, ("No", "Yes")),
        # regression; whole numbers by chance
        ([i / 2 for i in range(90)], [i % 3 for i in range(90)], ("ill",)),
    ):
        for file, first, labels in (("all", 0, common), ("own", 90, local)):
            base.assign(u=base["u"] + first, ill=labels).to_csv(
                tmp_path / f"{file}.csv", index=False
            )
        source = SourceConfig(name="table", path=str(tmp_path / "all.csv"), label="ill")
        own = ClientSettings(data=source.model_copy(update={"path": str(tmp_path / "own.csv")}))
        dataset = load_source(source, tmp_path)
        assert dataset.task.names == names
        data = federate(dataset, DataConfig(), {"own": own, "rest": PLAIN_CLIENT}, 0)
        notes = [note for note in data.notes if not isinstance(note, Caution)]
        assert notes[0].startswith("table all.csv: label ill; columns used: u, v; left out: none")
        assert notes[1].startswith("clients: 'own': data: table own.csv: label ill")


def test_local_sets_replace_held_out_rows_of_a_client() -> None:
    dataset = numbered(60, groups=["a"] * 30 + ["b"] * 20 + ["c"] * 10)
    local = numbered(12, groups=["b"] * 8 + ["a"] * 4).train
    dataset = replace(dataset, local_sets={"test": local})
    partition = PartitionConfig(kind="natural", min_size=2)
    config = DataConfig(partition=partition, validation=0)

    data = federate(dataset, config, dict.fromkeys("abc", PLAIN_CLIENT), seed=0)

    assert rows_of(data, "a", "test") == [8, 9, 10, 11]
    assert rows_of(data, "b", "test") == list(range(8))
    assert rows_of(data, "c", "test") == []
    # Validation rows are held out of the training rows, and no test rows are.
    for client, count in (("a", 30), ("b", 20), ("c", 10)):
        validation = round(0.15 * count)
        assert data.n_rows(client, "validation") == validation
        assert data.n_rows(client, "train") == count - validation


def test_local_sets_are_ignored_in_other_partitions() -> None:
    dataset = numbered(90, groups=["a", "b", "c"] * 30)
    with_local = replace(
        dataset, local_sets={"test": numbered(9, groups=["a", "b", "c"] * 3).train}
    )
    clients = dict.fromkeys("abc", PLAIN_CLIENT)

    plain = federate(dataset, DataConfig(), clients, seed=0)
    data = federate(with_local, DataConfig(), clients, seed=0)

    assert plain.content_hash() == data.content_hash()
    assert data.notes == [
        "data.partition.kind=iid does not use the clients of arrays; set "
        "data.partition.kind=natural to keep them"
    ]
