"""Recordings and tables of users, and simulated banks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hetero_fl.config.data import DataConfig, WindowsConfig
from hetero_fl.data import federate
from tests.support.federated_data import PLAIN_CLIENT, read_source
from tests.support.mistakes import refusal


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
            {"x": np.zeros(3), "y": [0, 1, 0]},
            ("x: expected shape (N, T, F) or (N, F), got (3,)"),
        ),
        (
            {"x": np.zeros((3, 4, 2)), "y": [0, 1]},
            "y: expected 3 rows as in x, got 2",
        ),
        (
            {"x": np.full((3, 4, 2), np.nan), "y": [0, 1, 0]},
            "x: row 0: NaN or infinite value",
        ),
        (
            {"x": np.zeros((3, 4, 2)), "y": [0, 1, 0], "columns": ["a"]},
            "columns: expected 2 names, got 1",
        ),
        (
            {"x": np.zeros((3, 4, 2)), "y": [0, 1, 0], "split": ["train", "validatio", "test"]},
            "split: unknown value 'validatio'; did you mean 'validation'?",
        ),
        (
            {"x": np.zeros((2, 4, 2)), "y": [0, 1], "split": ["test", "test"]},
            "split: expected rows of 'train', got none",
        ),
        (
            {"x": np.zeros((2, 4, 2)), "y": [0, 1], "split": [["train", "test"]] * 2},
            "split: expected shape (N,), got (2, 2)",
        ),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        refused = refusal(read_source, "activity", tmp_path / "bad.npz")
        assert words in refused and "bad.npz" in refused
