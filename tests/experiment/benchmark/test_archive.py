"""The CSV file of the runs, and the recorded configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment.benchmark.archive import (
    ConfigArchive,
    RowConfig,
    RunArchive,
    flatten_config,
)
from hetero_fl.experiment.benchmark.protocol import BenchmarkRow
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


def configs(**changes: Any) -> dict[str, RowConfig]:
    base = flatten_config(load_config({**SOURCE, **changes}))
    return {
        "fedavg/none": RowConfig(base, base),
        "fedavg/all": RowConfig({**base, "algorithm.mu": 1.0}, base),
    }


def values_of(configs: dict[str, RowConfig]) -> dict[str, dict[str, Any]]:
    return {row: config.values for row, config in configs.items()}


def with_key(configs: dict[str, RowConfig], value: int) -> dict[str, RowConfig]:
    """Return the configurations with a new key, which has the default 7."""
    return {
        row: RowConfig({**config.values, "data.new": value}, {**config.defaults, "data.new": 7})
        for row, config in configs.items()
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

    assert ConfigArchive(archive.path).configs == values_of(configs())
    assert archive.outdated(configs()) == {}
    assert len(hashes) == 4


def test_a_new_key_is_found_if_the_row_sets_it(archive: ConfigArchive) -> None:
    before = archive.hash_of("fedavg/all", "a=1")
    archive.update(with_key(configs(), 7))
    assert archive.outdated(with_key(configs(), 7)) == {}
    assert archive.hash_of("fedavg/all", "a=1") == before, "a default does not change results"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (with_key(configs(), 8), "data.new: 7 in the archive, 8 now"),
        (
            configs(clients={"count": 2, "defaults": {"batch_size": 8}}),
            "clients.defaults.batch_size: 32 in the archive, 8 now",
        ),
    ],
    ids=["new key", "changed default"],
)
def test_a_changed_key_is_found(
    changed: dict[str, RowConfig], reason: str, archive: ConfigArchive
) -> None:
    before = archive.hash_of("fedavg/all", "a=1")
    assert set(archive.outdated(changed).values()) == {reason}
    archive.update(changed)
    assert archive.outdated(changed) == {}
    assert archive.hash_of("fedavg/all", "a=1") != before


def test_a_removed_key_is_outdated(archive: ConfigArchive) -> None:
    fewer = {
        row: RowConfig({k: v for k, v in config.values.items() if k != "rounds"}, config.defaults)
        for row, config in configs().items()
    }
    assert archive.outdated(fewer)["fedavg/none"] == "rounds: 2 in the archive, None now"


def test_the_defaults_of_a_row_are_those_of_its_method() -> None:
    row = BenchmarkRow(
        method="fedprox", components="all", settings=["mu=0.5", "logit_adjustment=true"]
    )
    config = RowConfig.resolve(SOURCE, ["rounds=3"], row)
    assert config.values["rounds"] == config.defaults["rounds"] == 3
    differing = {key for key in config.values if config.values[key] != config.defaults.get(key)}
    assert differing == {"algorithm.mu", "clients.defaults.logit_adjustment"}


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
