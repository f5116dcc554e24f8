"""The CSV file of the runs, and the recorded configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.league.archive import ConfigArchive, RunArchive, flatten_config
from hetero_fl.config import Config
from hetero_fl.experiment.configuration import load_config

KEY = {"method": "fedavg", "components": "all", "settings": "a=1", "seed": 3}
SOURCE: dict[str, Any] = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 2}


def test_a_row_replaces_an_earlier_row_of_the_same_run(tmp_path: Path) -> None:
    archive = RunArchive(tmp_path / "new" / "runs.csv")
    archive.add({**KEY, "score": 0.5, "config_hash": "x"})
    archive.add({**KEY, "seed": 4, "score": None, "config_hash": "x"})
    archive.add({**KEY, "score": 0.123456789, "config_hash": "y"})
    found = RunArchive(archive.path).rows
    assert found == archive.rows
    assert [(row["seed"], row["score"], row["config_hash"]) for row in found.values()] == [
        ("3", "0.123457", "y"),
        ("4", "", "x"),
    ]
    assert [path.name for path in archive.path.parent.iterdir()] == ["runs.csv"]


def test_rows_are_ordered_and_removed_by_their_keys(tmp_path: Path) -> None:
    archive = RunArchive(tmp_path / "runs.csv")
    for seed in (2, 0, 1):
        archive.add({**KEY, "seed": seed})
    archive.arrange([("fedavg", "all", "a=1", str(seed)) for seed in (0, 1, 5)])
    assert [row["seed"] for row in RunArchive(archive.path).rows.values()] == ["0", "1"]


def configs(**changes: Any) -> dict[str, Config]:
    source = {**SOURCE, **changes}
    return {
        "fedavg/none": load_config(source),
        "fedavg/all": load_config(source, ["clients.defaults.logit_adjustment=true"]),
    }


@pytest.fixture
def archive(tmp_path: Path) -> ConfigArchive:
    """Return an archive of the configurations."""
    made = ConfigArchive(tmp_path / "configs.json")
    made.update(configs())
    return made


def test_recorded_configurations_are_read_without_loss(archive: ConfigArchive) -> None:
    rows, settings = ("fedavg/none", "fedavg/all"), ("a=1", "a=2")

    hashes = {archive.hash_of(row, each) for row in rows for each in settings}

    read = ConfigArchive(archive.path).configs
    assert read == {row: flatten_config(config) for row, config in configs().items()}
    assert archive.outdated(configs()) == {}
    assert len(hashes) == 4


def test_names_with_periods_are_recorded_without_loss(tmp_path: Path) -> None:
    columns = {"data": {"name": "table", "categories": {"a": ["x"], "a.b": ["y", "z"]}}}
    archive = ConfigArchive(tmp_path / "configs.json")

    archive.update(configs(**columns))

    assert ConfigArchive(archive.path).outdated(configs(**columns)) == {}


def test_defaults_of_removed_and_new_keys_are_not_outdated(archive: ConfigArchive) -> None:
    for recorded in archive.configs.values():
        recorded["channel.entropy"] = False
        del recorded["clients.defaults.batch_size"]
    before = archive.hash_of("fedavg/all", "a=1")

    archive.update(configs())

    assert archive.outdated(configs()) == {}
    assert archive.hash_of("fedavg/all", "a=1") == before


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("rounds", 3, "rounds: was 3, is now 2"),
        ("clients.defaults.batch_size", 8, "clients.defaults.batch_size: was 8, is now 32"),
        ("channel.entropy", True, "channel.entropy was removed; use topk"),
        ("data.new", 7, "data.new: unknown key"),
    ],
)
def test_another_value_is_outdated(
    key: str, value: object, reason: str, archive: ConfigArchive
) -> None:
    before = archive.hash_of("fedavg/all", "a=1")
    archive.configs["fedavg/all"][key] = value

    assert archive.outdated(configs())["fedavg/all"].startswith(reason)
    archive.update(configs())
    assert archive.outdated(configs()) == {}
    assert archive.hash_of("fedavg/all", "a=1") == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 7},
        {"name": "other"},
        {"output": {"plots": False}},
        {"runtime": {"workers": 3, "executor": "processes"}},
        {"data": {"name": "digits", "root": "/elsewhere"}},
    ],
)
def test_places_seeds_and_output_are_not_recorded(change: dict[str, Any]) -> None:
    changed = flatten_config(load_config({**SOURCE, **change}))
    same = flatten_config(load_config(SOURCE))
    different = {key for key in changed if changed[key] != same.get(key)}
    assert different <= {"runtime.executor"}
