"""The CSV file of the runs, and the recorded configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment.benchmark.archive import ConfigArchive, RunArchive, flatten_config
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


def configs(**changes: Any) -> dict[str, dict[str, Any]]:
    base = flatten_config(load_config({**SOURCE, **changes}))
    return {"fedavg/none": base, "fedavg/all": {**base, "algorithm.mu": 1.0}}


def test_recorded_configurations_are_read_without_loss(tmp_path: Path) -> None:
    archive = ConfigArchive(tmp_path / "configs.json")
    archive.update(configs())
    assert ConfigArchive(archive.path).configs == configs()
    assert archive.outdated(configs()) == {}


def test_a_changed_default_is_found_and_a_new_key_is_not(tmp_path: Path) -> None:
    archive = ConfigArchive(tmp_path / "configs.json")
    archive.update(configs())
    before = archive.hash_of("fedavg/all", "a=1")
    newer = {row: {**config, "data.new_key": 7} for row, config in configs().items()}
    archive.update(newer)
    assert archive.outdated(newer) == {}
    assert archive.hash_of("fedavg/all", "a=1") == before, "a new key does not change results"

    changed = configs(clients={"count": 2, "defaults": {"batch_size": 8}})
    (reason,) = set(archive.outdated(changed).values())
    assert reason == "clients.defaults.batch_size: 32 in the archive, 8 now"
    archive.update(changed)
    assert archive.outdated(changed) == {}
    assert archive.hash_of("fedavg/all", "a=1") != before


def test_a_removed_key_is_outdated(tmp_path: Path) -> None:
    archive = ConfigArchive(tmp_path / "configs.json")
    archive.update(configs())
    fewer = {
        row: {key: value for key, value in config.items() if key != "rounds"}
        for row, config in configs().items()
    }
    assert archive.outdated(fewer)["fedavg/none"] == "rounds: 2 in the archive, None now"


def test_hashes_differ_by_row_settings_and_configuration(tmp_path: Path) -> None:
    archive = ConfigArchive(tmp_path / "configs.json")
    archive.update(configs())
    hashes = {
        archive.hash_of(row, settings)
        for row in ("fedavg/none", "fedavg/all")
        for settings in ("a=1", "a=2")
    }
    assert len(hashes) == 4


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


def test_rounds_are_recorded() -> None:
    assert flatten_config(load_config(SOURCE))["rounds"] == 2
