"""Notes on the columns of the source `hf`, which agree with those of the source `table`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source
from tests.support.cases import each_case

datasets = pytest.importorskip("datasets", reason="pip install 'hetero_fl[huggingface]'")


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def visits(rows: int = 40) -> pd.DataFrame:
    """Return a table of visits, with four rows of each patient."""
    return pd.DataFrame(
        {
            "age": np.arange(rows) + 0.5,
            "ward": [["A", "B"][i % 2] for i in range(rows)],
            "patient": [f"p{i // 4}" for i in range(rows)],
            "hospital": [["north", "south"][i % 2] for i in range(rows)],
            "when": pd.date_range("2024-01-01", periods=rows),
            "y": [["ill", "well"][i % 2] for i in range(rows)],
        }
    )


def notes_of(frame: pd.DataFrame, folder: Path, kind: str, **keys: Any) -> list[str]:
    """Return the notes on a data frame without the name of the file."""
    if kind == "table":
        frame.to_parquet(folder / "visits.parquet")
        source = SourceConfig(name="table", path=str(folder / "visits.parquet"), **keys)
    else:
        datasets.Dataset.from_pandas(frame).save_to_disk(str(folder / "visits"))
        source = SourceConfig(name=f"hf:{folder / 'visits'}", **keys)
    return [note.partition(": ")[2] for note in load_source(source, folder).notes]


@each_case("keys", ({}, {"group": "hospital"}, {"group": "hospital", "patient": "patient"}))
def test_notes_are_those_of_a_table(keys: Any, tmp_path: Path) -> None:
    notes = {
        kind: notes_of(visits(), tmp_path, kind, label="y", **keys) for kind in ("table", "hf")
    }

    assert notes["hf"] == notes["table"]
    repeated = [note for note in notes["hf"] if "seems to identify patients" in note]
    assert len(repeated) == ("patient" not in keys)
    for key, column in keys.items():
        assert f"{key} {column}; " in notes["hf"][0]


def test_columns_are_listed_as_used_or_as_left_out(tmp_path: Path) -> None:
    frame = visits().drop(columns=["patient"])

    [note] = notes_of(frame, tmp_path, "hf", label="y", columns={"input": ["age", "when"]})

    used, left_out = note.split("; left out: ")
    assert used == "label y; columns used: age"
    assert "age" not in left_out
    assert left_out.startswith("when (datetime64")
    assert left_out.endswith("ward (not in columns.input), hospital (not in columns.input)")


def test_repeated_patients_of_images_are_noted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    content = {
        "image": [Image.fromarray(each) for each in pixels],
        "subject_id": [i // 3 for i in range(12)],
        "label": [i % 2 for i in range(12)],
    }
    part = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    part.save_to_disk(str(tmp_path / "images"))

    dataset = load_source(SourceConfig(name=f"hf:{tmp_path / 'images'}"), tmp_path)

    assert any("'subject_id' seems to identify patients and repeats" in n for n in dataset.notes)
    assert not any("is a feature" in note for note in dataset.notes)


def test_mapped_group_and_patient_are_named(tmp_path: Path) -> None:
    frame = visits().assign(note="fever and cough")

    notes = notes_of(
        frame,
        tmp_path,
        "hf",
        columns={"input": "note", "label": "y", "group": "hospital", "patient": "patient"},
    )

    assert "input note; label y; group hospital; patient patient" in notes
