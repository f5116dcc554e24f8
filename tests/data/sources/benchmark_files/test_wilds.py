"""Folders of Camelyon17 and iWildCam in the layout of WILDS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.errors import UserError
from tests.support.benchmark_folders import write_camelyon17, write_iwildcam
from tests.support.cases import each_case


def load(path: Path, name: str = "camelyon17", **keys: Any) -> Dataset:
    return load_source(SourceConfig(name=name, path=str(path), **keys), path)


def configuration(path: Path, name: str, clients: int, **data: Any) -> dict[str, Any]:
    return {
        "rounds": 1,
        "data": {
            "name": name,
            "path": str(path),
            "partition": {"kind": "natural", "min_size": 4},
            **data,
        },
        "clients": {"count": clients, "defaults": {"model": "lenet"}},
        "algorithm": {"name": "fedavg"},
        "output": {"plots": False, "report": False},
    }


def groups_of(dataset: Dataset) -> list[str]:
    assert dataset.train.group is not None
    return [dataset.train.group_names[g] for g in dataset.train.group.unique().tolist()]


def change_metadata(path: Path, pattern: str, replacement: str) -> None:
    file = path / "metadata.csv"
    file.write_text(re.sub(pattern, replacement, file.read_text(), count=1))


def test_official_splits_of_camelyon17(tmp_path: Path) -> None:
    dataset = load(write_camelyon17(tmp_path))

    assert groups_of(dataset) == ["0", "3", "4"]
    assert {name: len(part) for name, part in dataset.splits().items()} == {
        "train": 3 * 4 * 3,
        "validation": 4 * 6,
        "test": 4 * 6,
    }
    assert {name: len(part) for name, part in dataset.local_sets.items()} == {"validation": 36}
    assert dataset.validation is not None and dataset.validation.group is None
    assert dataset.task.names == ("normal", "tumor")
    assert dataset.train.x.shape[1:] == (3, 12, 12)
    is_bright = dataset.train.x.float().mean((1, 2, 3)) > 110
    assert torch.equal(is_bright.long(), dataset.train.labels)
    assert dataset.train.patient_names[0] == "000"


def test_patients_of_a_hospital_are_not_divided(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path)

    data = load_federated_data(load_config(configuration(path, "camelyon17", 3)))

    for client in data.client_ids:
        rows = {s: data.client_rows[client][s].copy_rows() for s in ("train", "test")}
        patients = [
            set(part.patient.tolist()) for part in rows.values() if part.patient is not None
        ]
        assert len(patients) == 2 and not patients[0] & patients[1]
        validation = data.client_rows[client]["validation"].copy_rows().patient
        assert validation is not None and len(validation) == 9
        assert not set(validation.tolist()) & patients[1]
    removed = [note for note in data.notes if "given validation set" in note]
    assert len(removed) == 1 and "9 rows" in removed[0]


def test_all_hospitals_are_clients_without_splits(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path)

    dataset = load(path, splits="pooled", size=8)

    assert groups_of(dataset) == list("01234") and len(dataset.train) == 120
    assert dataset.test is None and not dataset.local_sets
    assert dataset.train.x.shape[1:] == (3, 8, 8)
    assert groups_of(load(path, splits="pooled", group="slide"))[:2] == ["0", "1"]


def test_official_splits_of_iwildcam(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)

    dataset = load(path, "iwildcam", size=12)
    data = load_federated_data(load_config(configuration(path, "iwildcam", 3, size=12)))

    assert {name: len(part) for name, part in dataset.splits().items()} == {
        "train": 72,
        "validation": 8,
        "test": 12,
    }
    assert groups_of(dataset) == ["0", "1", "2"] and dataset.train.patient is None
    for client in data.client_ids:
        rows = [data.n_rows(client, split) for split in ("train", "validation", "test")]
        assert rows == [24, 3, 4]
    assert len(data.public_sets["common_validation"].rows) == 8


def test_location_replaces_a_missing_column(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)
    change_metadata(path, "location_remapped", "other")

    assert groups_of(load(path, "iwildcam", size=12)) == ["100", "101", "102"]


CATEGORIES = "y,category_id,name\n0,0,empty\n1,2,tayassu pecari\n2,3,dasyprocta punctata\n"
UNUSED = "99999,1,puma concolor\n99999,4,nasua nasua\n"


def test_categories_name_the_classes_of_iwildcam(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)
    (path / "categories.csv").write_text(CATEGORIES + "3,7,felis catus\n" + UNUSED)

    dataset = load(path, "iwildcam", size=12)

    # No image shows the last class.
    assert int(dataset.train.labels.max()) == 2
    assert dataset.task.names == ("empty", "tayassu pecari", "dasyprocta punctata", "felis catus")


def test_label_without_a_category_is_out_of_range(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)
    (path / "categories.csv").write_text(CATEGORIES.replace("2,3", "99999,3"))

    with pytest.raises(UserError, match=r"metadata\.csv: row \d+: label 2 is out of range 0 to 1"):
        load(path, "iwildcam", size=12)


@each_case(
    ("old", "new", "message"),
    (
        ("1,2,", "3,2,", r"categories\.csv: column 'y': class 1 not found$"),
        ("1,2,", "0,2,", r"categories\.csv: row 2: class 0 occurs twice; remove one row$"),
        (
            "empty",
            "tayassu pecari",
            r"row 2: name 'tayassu pecari' occurs twice; remove one row$",
        ),
        ("1,2,", "one,2,", r"row 2, column 'y': expected a class number >= 0, got 'one'"),
        ("empty", "", r"categories\.csv: .*column 'name'"),
        ("name", "label", r"categories\.csv: column 'name' not found"),
    ),
)
def test_malformed_categories_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path, rows=3)
    (path / "categories.csv").write_text(CATEGORIES.replace(old, new, 1))

    with pytest.raises(UserError, match=message) as caught:
        load(path, "iwildcam", size=12)

    assert str(caught.value).startswith("data.path: ") and "\n" not in str(caught.value)


@each_case(
    ("pattern", "replacement", "message"),
    (
        (",tumor,", ",label,", r"metadata\.csv: column 'tumor' not found"),
        (r"\n0,000,0,0,0,0", "\n0,000,0,0,0,2", r"row 1: label 2 is out of range 0 to 1"),
        (
            r"\n0,000,0,0,0,0",
            "\n0,000,0,0,0,x",
            r"row 1, column 'tumor': expected a class number",
        ),
        (r"\n0,000,0,0,0,0", "\n0,000,0,0,0,", r"row 1, column 'tumor'"),
        (r"\n0,000,0,0", "\n0,000,0,9", r"x_9_y_0\.png: file not found"),
        (r"(\n0,000.*),0\n", r"\1,7\n", r"row 1, column 'split': unknown split '7'"),
        (
            r"(\n\d+,019.*),1\n$",
            r"\1,7\n",
            r"row 40, column 'split': unknown split '7'; choose from 0, 1",
        ),
        (r"(\n\d+,008.*),1\n", r"\1,7\n", r"row 18, column 'split': unknown split '7'"),
        (
            r"\n0,000,0,0,0,0",
            "\n0,000,0,0,0," + "9" * 5000,
            r"row 1: label 10000 is out of range",
        ),
        (r"(?s)\n.*", "\n", r"metadata\.csv: has no rows"),
        (r"(?s).*", "", r"metadata\.csv: the file is empty"),
    ),
)
def test_malformed_metadata_is_named(
    pattern: str, replacement: Any, message: str, tmp_path: Path
) -> None:
    path = write_camelyon17(tmp_path, patches=1)
    change_metadata(path, pattern, replacement)

    with pytest.raises(UserError, match=message) as caught:
        load(path)

    assert str(caught.value).startswith("data.path: ")


def test_official_splits_require_the_hospitals_of_wilds(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path, patches=1)
    file = path / "metadata.csv"
    file.write_text(re.sub(r",(\d),(\d)\n", r",site \1,\2\n", file.read_text()))

    with pytest.raises(UserError) as caught:
        load(path)

    assert str(caught.value) == (
        f"data.path: {file}: column 'center': expected the hospitals 1 (validation) and 2 (test), "
        "got 'site 0', 'site 1', 'site 2', 'site 3', 'site 4'; set data.splits=pooled to use all "
        "rows"
    )
    assert len(groups_of(load(path, splits="pooled"))) == 5


def test_file_in_place_of_a_folder(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name in ("htfllib", "leaf", "camelyon17", "iwildcam"):
        for file in ("0.npz", "metadata.csv"):
            with subtests.test(name=name, file=file):
                (tmp_path / file).write_bytes(b"0")

                with pytest.raises(
                    UserError, match=f"data.path: .*{file}: expected a folder, got a file"
                ):
                    load(tmp_path / file, name)


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path / "cameras")
    for folder, keys, message in (
        (tmp_path / "none", {}, r"data\.path: folder '.*none' not found"),
        (tmp_path, {"name": "iwildcam"}, r"data\.path: file '.*metadata\.csv' not found"),
        (path, {"name": "iwildcam"}, r"set data\.size to resize all images"),
        (path, {"name": "iwildcam", "group": "cam"}, "column 'cam' not found"),
    ):
        with pytest.raises(UserError, match=message):
            load(folder, **keys)
    text = (path / "metadata.csv").read_text().replace("train,", "id_val,")
    (path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match="no row belongs to the split 'train'"):
        load(path, "iwildcam", size=12)
    with pytest.raises(UserError, match=r"set data\.name=iwildcam and data\.path="):
        load_source(SourceConfig(name=str(path)), path)


cell = st.text(st.characters(codec="utf-8", exclude_characters='"'), max_size=5) | st.sampled_from(
    ["0", "1", "-1", "1.5", "id_val", "train", "../x.jpg", "9" * 30, "NaN", ""]
)


@settings(
    max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.lists(cell, min_size=4, max_size=6), max_size=3), name=st.sampled_from("ab")
)
def test_any_metadata_gives_one_line(rows: list[list[str]], name: str, tmp_path: Path) -> None:
    header = {
        "a": ["split", "location", "y", "filename"],
        "b": ["patient", "node", "x_coord", "y_coord", "tumor", "center", "split"],
    }[name]
    lines = [",".join(f'"{value}"' for value in row) for row in [header, *rows]]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")

    with pytest.raises(UserError) as caught:
        load(tmp_path, {"a": "iwildcam", "b": "camelyon17"}[name])

    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.")


@each_case(("write", "name"), ((write_camelyon17, "camelyon17"), (write_iwildcam, "iwildcam")))
def test_every_column_of_the_metadata_is_kept(write: Any, name: str, tmp_path: Path) -> None:
    path = write(tmp_path)
    dataset = load(path, name, splits="pooled", size=12)
    lines = (path / "metadata.csv").read_text().splitlines()
    header, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]

    assert len(dataset.train.metadata) == len(header)
    for column, values in zip(header, zip(*rows, strict=True), strict=True):
        if column:
            found = [str(value).zfill(len(values[0])) for value in dataset.train.metadata[column]]
            assert found == [value.zfill(len(values[0])) for value in values], column
