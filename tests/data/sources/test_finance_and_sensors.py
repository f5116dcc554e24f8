"""Generated banks and persons, and recordings and tables of users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hetero_fl.config.data import DataConfig, WindowsConfig
from hetero_fl.data import federate
from hetero_fl.data.sources import sensors, tables
from tests.support.federated_data import PLAIN_CLIENT, read_source
from tests.support.mistakes import refusal


def test_banks_differ_in_columns_and_fraud_rate() -> None:
    dataset = read_source("bank_fraud")
    train = dataset.train
    assert (
        dataset.simulated
        and dataset.columns == tables.COLUMNS
        and train.y is not None
        and train.group is not None
    )
    for place, (bank, (rows, rate)) in enumerate(tables.BANKS.items()):
        in_bank = train.group == place
        assert int(in_bank.sum()) == rows and float(
            train.y[in_bank].float().mean()
        ) == pytest.approx(rate, abs=1 / rows)
        own = tables.SPECIAL[bank.split("_")[0]]
        gaps = {
            name: float(train.x[in_bank][:, i].isnan().float().mean())
            for i, name in enumerate(dataset.columns)
        }
        assert all(gaps[name] == 0 for name in tables.COMMON_COLUMNS)
        assert all(0.1 < gaps[name] < 0.2 for name in own)  # customers who do not use the service
        assert all(gaps[n] == 1 for n in dataset.columns if n not in (*tables.COMMON_COLUMNS, *own))
    means = torch.stack([train.x[train.group == b][:, 0].mean() for b in range(6)])
    assert means.std() > 0.2  # drift


def test_rare_class_is_predictable() -> None:
    dataset = read_source("bank_fraud")
    kept = DataConfig(name="bank_fraud", split={"validation": 0.1, "test": 0.2})
    settings = PLAIN_CLIENT.model_copy(
        update={"preprocess": PLAIN_CLIENT.preprocess.model_copy(update={"missing": "indicate"})}
    )
    data = federate(dataset, kept, {"a": settings, "b": settings}, 0)
    assert data.task.rare == 1
    assert (
        federate(
            read_source("synthetic_table"), DataConfig(), {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}, 0
        ).task.rare
        is None
    )


def test_generated_windows_match_the_description() -> None:
    dataset = read_source("activity")
    train = dataset.train
    assert (
        train.x.shape[1:] == (64, 6) and train.y is not None and dataset.columns == sensors.CHANNELS
    )
    size = {
        name: train.x[train.y == c][..., :3].norm(dim=-1) for c, name in enumerate(sensors.NAMES)
    }
    assert size["stand"].mean() == pytest.approx(1.0, abs=0.05) and size[
        "sit"
    ].mean() == pytest.approx(1.0, abs=0.05)  # gravity
    assert size["run"].std() > 2 * size["walk"].std() > 4 * size["stand"].std()
    first, other = sensors.make_person(0), sensors.make_person(3)
    assert (first.placement, first.rate, other.placement, other.rate) == ("wrist", 25, "wrist", 50)
    assert np.allclose(first.rotation @ first.rotation.T, np.eye(3))
    assert (
        dataset.test is not None
        and dataset.test.y is not None
        and dataset.test.y.bincount().unique().numel() == 1
    )


def test_spectral_peak_follows_the_sampling_rate() -> None:
    """Check that the spectral peak of a walk is at cadence · 64 / rate."""
    person = sensors.make_person(2)
    walk = sensors.NAMES.index("walk")
    x = sensors.record(person, np.full(40, walk), np.random.default_rng(0))
    spectrum = np.abs(np.fft.rfft(x[..., 3:] - x[..., 3:].mean(1, keepdims=True), axis=1)).mean(
        (0, 2)
    )
    expected = sensors.ACTIVITIES["walk"].cadence * person.cadence * 64 / person.rate
    assert abs(spectrum.argmax() - expected) <= 1


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    rows = pd.DataFrame(
        {
            "t": np.arange(90),
            "activity": ["walk"] * 25 + ["sit"] * 20 + ["walk"] * 45,
            "person": ["ann"] * 45 + ["bob"] * 45,
            "ax": np.arange(90.0),
            "az": 1.0,
        }
    )
    rows.to_csv(tmp_path / "samples.csv", index=False)
    return tmp_path / "samples.csv"


def test_windows_contain_one_person_and_activity(samples: Path) -> None:
    found = read_source("activity", samples, windows=WindowsConfig(length=10, time="t"))
    train = found.train
    assert (
        found.columns == ("ax", "az")
        and found.task.names == ("sit", "walk")
        and not found.simulated
    )
    # 5 samples of a run are left over, twice
    assert train.x[:, 0, 0].tolist() == [0, 10, 25, 35, 45, 55, 65, 75]
    assert train.y is not None and train.y.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert (
        train.group is not None
        and train.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        and train.patient is None
    )
    half = read_source(
        "activity", samples, windows=WindowsConfig(length=10, step=5, time="t")
    ).train
    # overlapping ones stay together
    assert half.patient is not None and half.patient.unique().tolist() == [0, 1, 2]
    assert half.x[:4, 0, 0].tolist() == [0, 5, 10, 15]


def test_npz_with_windows_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.npz"
    np.savez(
        path,
        x=np.ones((4, 8, 2)),
        y=["a", "b", "a", "b"],
        person=[1, 1, 2, 2],
        columns=["ax", "ay"],
    )
    found = read_source("activity", path)
    assert (
        found.train.x.dtype == torch.float32
        and found.columns == ("ax", "ay")
        and found.task.names == ("a", "b")
    )
    assert found.train.group_names == ("1", "2")


def test_invalid_recordings_raise_one_line(samples: Path, tmp_path: Path) -> None:
    frame, cut = pd.read_csv(samples), {"length": 10, "time": "t"}
    for change, windows, keys, words in (
        (
            {},
            {"length": 50},
            {},
            (
                "windows.length: must be <= 45, the most "
                "consecutive samples of one person and activity"
            ),
        ),
        ({}, {"time": "time"}, {}, "data.windows.time: "),
        (
            {},
            {},
            {"label": "activty"},
            "column 'activty' not found in FILE; did you mean 'activity'?",
        ),
        ({}, {}, {"group": "perso"}, "column 'perso' not found in FILE; did you mean 'person'?"),
        (
            {"t": [*range(40), 3, *range(41, 90)]},
            cut,
            {},
            "row 41, column 't': times must increase, got '3' after '39'",
        ),
        (
            {"ax": ["1"] * 20 + ["high"] + ["1"] * 69},
            cut,
            {},
            "row 21, column 'ax': expected a number, got 'high'",
        ),
        ({"activity": ["walk"] * 89 + [None]}, cut, {}, "row 90, column 'activity': missing value"),
        ({"activity": "walk"}, cut, {}, "expected at least two classes in FILE, got walk only"),
    ):
        frame.assign(**change).to_csv(tmp_path / "bad.csv", index=False)
        message = refusal(
            read_source, "activity", tmp_path / "bad.csv", windows=WindowsConfig(**windows), **keys
        )
        assert (
            words.replace("FILE", str(tmp_path / "bad.csv")) in message
            and "bad.csv" in message
            and "\n" not in message
        ), message
    for arrays, words in (
        ({"x": np.zeros((3, 4, 2))}, "array 'y' not found"),
        (
            {"x": np.zeros((3, 4)), "y": [0, 1, 0]},
            (
                "x: expected numbers of shape (windows, samples, "
                "channels), got float64 of shape (3, 4)"
            ),
        ),
        (
            {"x": np.zeros((3, 4, 2)), "y": [0, 1]},
            "y: expected 3 rows as in x, got 2",
        ),
        (
            {"x": np.full((3, 4, 2), np.nan), "y": [0, 1, 0]},
            "x: window 0, sample 0, channel 0: NaN or infinite value",
        ),
        (
            {"x": np.zeros((3, 4, 2)), "y": [0, 1, 0], "columns": ["a"]},
            "columns: expected 2 names of channels, got 1",
        ),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        refused = refusal(read_source, "activity", tmp_path / "bad.npz")
        assert words in refused and "bad.npz" in refused
