"""Tables that name images: any table, and the folders of Camelyon17 and iWildCam of WILDS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, SourceConfig
from hetero_fl.data import Dataset, federate
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from tests.support.benchmark_folders import write_camelyon17, write_iwildcam
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.image_folders import write_image_table
from tests.support.mistakes import check_refused, refusal


def load(path: Path, name: str = "image_table", **keys: Any) -> Dataset:
    if name == "image_table":
        keys = {"file": "file", "label": "y", **keys}
    return read_source(name, path, path.parent / "downloads", **keys)


def pixels_of(path: Path, files: pd.Series) -> torch.Tensor:
    images = [np.asarray(Image.open(path.parent / file)) for file in files]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1)


def groups_of(dataset: Dataset) -> list[str]:
    assert dataset.train.group is not None
    return [dataset.train.group_names[g] for g in dataset.train.group.unique().tolist()]


def change_table(file: Path, pattern: str, replacement: str) -> None:
    file.write_text(re.sub(pattern, replacement, file.read_text(), count=1))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("file", ["file", "{site}/{number}.png"])
@pytest.mark.parametrize("stream", [True, None])
def test_table_names_images(suffix: str, file: str, stream: bool | None, tmp_path: Path) -> None:
    path = write_image_table(tmp_path / "scans", suffix=suffix)

    dataset = load(path, file=file, group="site", patient="patient", stream=stream)

    frame = pd.read_csv(write_image_table(tmp_path / "scans"), dtype={"number": str})
    train = dataset.train
    assert torch.equal(train.x, pixels_of(path, frame["file"]))
    assert [dataset.task.names[y] for y in train.labels.tolist()] == frame["y"].tolist()
    assert groups_of(dataset) == ["north", "south"] and len(train.patient_names) == 8
    assert list(map(int, train.metadata["number"])) == list(range(24))
    assert train.locate(4, "train") == f"path: {path}: row 5"


def test_unused_columns_may_contain_anything(tmp_path: Path) -> None:
    path = write_image_table(tmp_path / "scans", suffix="parquet")
    table = pd.read_parquet(path)
    table.assign(boxes=[[1, 2]] * len(table), y=table["y"].str.encode("utf-8")).to_parquet(path)

    dataset = load(path)

    names = [dataset.task.names[y] for y in dataset.train.labels.tolist()]
    assert names == table["y"].tolist()


def test_columns_name_the_splits(tmp_path: Path) -> None:
    path = write_image_table(tmp_path)
    folds = {"train": "train", "val": "validation", "test": "test"}

    dataset = load(path, group="site", splits={"fold": folds})
    local = load(path, group="site", splits={"fold": {"val": "local_test"}})
    mixed = load(
        path, splits={"site": {"south": "test"}, "fold": {**folds, "val": "local_validation"}}
    )

    assert {name: len(part) for name, part in dataset.splits().items()} == {
        "train": 22,
        "validation": 1,
        "test": 1,
    }
    assert dataset.test is not None and dataset.test.group is None
    assert torch.equal(dataset.test.x, pixels_of(path, pd.Series(["south/23.png"])))
    assert len(local.train) == 23 and local.local_sets["test"].group is not None
    # The first column decides.
    assert mixed.test is not None and len(mixed.test) == 12 and not mixed.local_sets


@pytest.mark.parametrize("stream", [True, None])
def test_numbers_are_blocks_beside_the_image(stream: bool | None, tmp_path: Path) -> None:
    path = write_image_table(tmp_path)
    change_table(path, "north/01.png,", ",")
    change_table(path, r",22\.5,", ",,")

    dataset = load(path, blocks={"vitals": ["pulse"], "person": ["age"]}, stream=stream)

    assert [tuple(block) for block in dataset.blocks] == [
        ("image", (3, 8, 8)),
        ("vitals", (1,)),
        ("person", (1,)),
    ]
    x = dataset.train.x
    first = pixels_of(path, pd.Series(["north/00.png"])).flatten()
    assert torch.equal(x[0, :192], first / 255) and x[0, 192:].tolist() == [60, 20.5]
    assert x[1, :192].isnan().all() and x[1, 192:].tolist() == [61, 21.5]
    assert x[2, 192] == 62 and x[2, 193].isnan()
    assert "row 3, column 'age': missing value" in dataset.first_missing


def test_rows_are_split_by_time_with_a_gap(tmp_path: Path) -> None:
    path = write_image_table(tmp_path)
    day = 24 * 3600

    dataset = load(path, time="day", span=2 * day)
    config = DataConfig(name="image_table", validation=0)
    data = federate(dataset, config, {"a": ClientSettings(preprocess=PreprocessConfig())}, 0)

    days = {
        name: data.extra_columns("a", name).time // day  # type: ignore[operator]
        for name in ("train", "common_test")
    }
    assert torch.equal(load(path, time="pulse").train.time, torch.arange(60, 84))  # type: ignore[arg-type]
    assert days["common_test"].min() - days["train"].max() > 2


def write_dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2") -> None:
    pydicom = pytest.importorskip("pydicom", reason="pip install 'hetero_fl[dicom]'")
    content = pydicom.Dataset()
    content.Rows, content.Columns = pixels.shape
    content.SamplesPerPixel = 1
    content.PhotometricInterpretation = photometric
    content.BitsAllocated = 8 * pixels.dtype.itemsize
    content.BitsStored = 8 if pixels.dtype == np.uint8 else 12
    content.HighBit = content.BitsStored - 1
    content.PixelRepresentation = int(pixels.dtype == np.int16)
    content.PixelData = pixels.tobytes()
    content.SOPClassUID = content.SOPInstanceUID = "1.2.3"
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content.save_as(path, enforce_file_format=True)


def test_dicom_images_keep_their_bits(tmp_path: Path) -> None:
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 256
    write_dicom(tmp_path / "a.dcm", deep)
    write_dicom(tmp_path / "b.dcm", deep, "MONOCHROME1")
    (tmp_path / "rows.csv").write_text("file,y\na.dcm,0\nb.dcm,1\n")

    x = load(tmp_path / "rows.csv").train.x

    assert x.dtype == torch.int32 and torch.equal(x[0, 0], torch.from_numpy(deep.astype(np.int32)))
    # The smallest values of the second kind are the brightest.
    assert torch.equal(x[1], 4095 - x[0])
    write_dicom(tmp_path / "b.dcm", -deep.astype(np.int16))
    check_refused(
        r"b\.dcm: not a readable image \(pixels must be >= 0", load, tmp_path / "rows.csv"
    )
    (tmp_path / "b.dcm").write_bytes(b"none")
    check_refused(
        r"b\.dcm: not a readable image \(File is missing DICOM", load, tmp_path / "rows.csv"
    )


MISTAKES: list[tuple[str, str, dict[str, Any], str]] = [
    ("", "", {"file": None}, "^data.file: missing; name a column of the table"),
    ("", "", {"label": None}, "^data.label: missing; name a column"),
    ("", "", {"file": "fil"}, "^data.file: column 'fil' not found in .*; did you mean 'file'"),
    ("", "", {"file": "{site}/{numbr}.png"}, "^data.file: column 'numbr' not found"),
    ("", "", {"label": "z"}, "^data.label: column 'z' not found"),
    ("", "", {"group": "sites"}, "^data.group: column 'sites' not found"),
    ("", "", {"time": "date"}, "^data.time: column 'date' not found"),
    ("", "", {"blocks": {"a": ["agee"]}}, "^data.blocks: column 'agee' not found"),
    ("", "", {"blocks": {"a": ["site"]}}, "row 1, column 'site': expected a number, got"),
    ("", "", {"label": "age", "blocks": {"a": ["age"]}}, "^data.blocks: column 'age' is the label"),
    ("", "", {"span": 3}, "^data.time: missing; name a column of the table"),
    ("", "", {"splits": {"folds": {"val": "test"}}}, "^data.splits: column 'folds' not found"),
    ("", "", {"splits": {"fold": {"dev": "test"}}}, "expected the value 'dev' of data.splits, got"),
    ("", "", {"splits": {"fold": {"val": "train"}}}, "row 1, column 'fold': unknown split 'train'"),
    (
        "",
        "",
        {"splits": {"site": {"north": "test", "south": "validation"}}},
        "no row belongs to the split 'train'",
    ),
    ("", "", {"task": "regression"}, "column 'y': expected numbers as regression labels"),
    ("", "", {"read": {"sep": ";"}}, "set the separator in data.read.sep"),
    ("north/00.png,", ",", {}, "row 1, column 'file': missing value"),
    ("north/00.png", "north/99.png", {}, r"^data.path: .*north/99\.png: file not found"),
    ("north/00.png", "/dev/null", {}, "row 1: expected a file in the folder, got '/dev/null'"),
    ("north/00.png", "../rows.png", {}, "row 1: expected a file in the folder, got '../rows"),
    ("north/00.png", "rows.csv", {}, r"rows\.csv: not a readable image"),
    (",blue,", ",,", {}, "row 1, column 'y': missing value"),
    ("2024-01-02", "soon", {"time": "day"}, "row 2, column 'day': expected a date as YYYY"),
    ("(?s)\n.*", "\n", {}, "rows.csv: has no rows"),
    ("file,", "site,", {}, "header: column 'site' occurs 2 times"),
]


@each_case(("pattern", "replacement", "keys", "message"), MISTAKES)
def test_malformed_table_raises_one_line(
    pattern: str, replacement: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_image_table(tmp_path)
    change_table(path, pattern, replacement)

    assert check_refused(message, load, path, **keys).startswith("data.")


def test_links_lead_to_files_of_the_folder(tmp_path: Path) -> None:
    path = write_image_table(tmp_path / "scans")
    file = path.parent / "north" / "00.png"
    file.rename(tmp_path / "outside.png")
    file.symlink_to(tmp_path / "outside.png")

    check_refused(r"00\.png: leads out to .*outside\.png; set data\.follow_links", load, path)
    assert len(load(path, follow_links=True).train) == 24


def test_splits_of_the_configuration_are_checked() -> None:
    for splits in ("offcial", {"fold": {"a": "tets"}}, {"fold": "test"}):
        assert "splits" in refusal(SourceConfig, name="image_table", splits=splits)


def configuration(path: Path, name: str, clients: int, **data: Any) -> dict[str, Any]:
    partition = {"kind": "natural", "min_size": 2}
    return {
        "rounds": 1,
        "data": {"name": name, "path": str(path), "partition": partition, **data},
        "clients": {"count": clients, "defaults": {"model": "lenet"}},
        "algorithm": {"name": "fedavg"},
    }


def test_official_splits_of_camelyon17(tmp_path: Path) -> None:
    dataset = load(write_camelyon17(tmp_path), "camelyon17")

    assert groups_of(dataset) == ["0", "3", "4"]
    assert [len(part) for part in dataset.splits().values()] == [36, 24, 24]
    assert {name: len(part) for name, part in dataset.local_sets.items()} == {"validation": 36}
    assert dataset.validation is not None and dataset.validation.group is None
    assert dataset.task.names == ("normal", "tumor")
    is_bright = dataset.train.x.float().mean((1, 2, 3)) > 110
    assert torch.equal(is_bright.long(), dataset.train.labels)
    assert dataset.train.patient_names[0] == "000"


def test_patients_of_a_hospital_are_not_divided(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path)

    data = load_federated_data(load_config(configuration(path, "camelyon17", 3)))

    for client in data.client_ids:
        patients = {}
        for split in ("train", "validation", "test"):
            rows = data.client_rows[client][split].copy_rows()
            assert rows.patient is not None
            patients[split] = set(rows.patient.tolist())
        assert not (patients["train"] | patients["validation"]) & patients["test"]
        assert data.n_rows(client, "validation") == 9
    assert sum("given validation set: 9 rows" in note for note in data.notes) <= 1


def test_all_hospitals_are_clients_without_splits(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path)

    dataset = load(path, "camelyon17", splits="pooled", size=8)

    assert groups_of(dataset) == list("01234") and len(dataset.train) == 120
    assert dataset.test is None and not dataset.local_sets
    assert dataset.train.x.shape[1:] == (3, 8, 8)
    by_slide = load(path, "camelyon17", splits="pooled", group="slide")
    assert groups_of(by_slide)[:2] == ["0", "1"]


def test_official_splits_of_iwildcam(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)

    dataset = load(path, "iwildcam", size=12)
    data = load_federated_data(load_config(configuration(path, "iwildcam", 3, size=12)))

    assert [len(part) for part in dataset.splits().values()] == [72, 8, 12]
    assert groups_of(dataset) == ["0", "1", "2"] and dataset.train.patient is None
    for client in data.client_ids:
        rows = [data.n_rows(client, split) for split in ("train", "validation", "test")]
        assert rows == [24, 3, 4]
    change_table(path / "metadata.csv", "location_remapped", "other")
    assert groups_of(load(path, "iwildcam", size=12)) == ["100", "101", "102"]


CATEGORIES = "y,category_id,name\n0,0,empty\n1,2,tayassu pecari\n2,3,dasyprocta punctata\n"


def test_categories_name_the_classes_of_iwildcam(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path)
    unused = "3,7,felis catus\n99999,1,puma concolor\n99999,4,nasua nasua\n"
    (path / "categories.csv").write_text(CATEGORIES + unused)

    dataset = load(path, "iwildcam", size=12)

    # No image shows the last class.
    assert int(dataset.train.labels.max()) == 2
    assert dataset.task.names == ("empty", "tayassu pecari", "dasyprocta punctata", "felis catus")


@each_case(
    ("name", "file", "pattern", "replacement", "message"),
    (
        ("iwildcam", "categories", "1,2,", "3,2,", "expected the classes from 0 and a name of"),
        ("iwildcam", "categories", "1,2,", "0,2,", "expected the classes from 0 and a name of"),
        ("iwildcam", "categories", "empty", "tayassu pecari", "a name of each, once"),
        ("iwildcam", "categories", "1,2,", "one,2,", "row 2, column 'y': expected a number"),
        ("iwildcam", "categories", "empty", "", r"categories\.csv: .*column 'name'"),
        ("iwildcam", "categories", "name", "label", "column 'name' not found in .*categories"),
        ("iwildcam", "categories", "2,3", "99999,3", r"row \d+: label 2 is out of range 0 to 1"),
        ("camelyon17", "metadata", ",tumor,", ",label,", "label: column 'tumor' not found"),
        (
            "camelyon17",
            "metadata",
            "\n0,000,0,0,0,0",
            "\n0,000,0,0,0,2",
            "row 1: label 2 is out of",
        ),
        ("camelyon17", "metadata", "\n0,000,0,0,0,0", "\n0,000,0,0,0,x", "row 1: .*'x'|'x'"),
        ("camelyon17", "metadata", "\n0,000,0,0", "\n0,000,0,9", r"x_9_y_0\.png: file not found"),
        ("camelyon17", "metadata", r"(\n0,000.*),0\n", r"\1,7\n", "row 1, column 'split': unknown"),
        ("camelyon17", "metadata", "(?s)\n.*", "\n", r"metadata\.csv: has no rows"),
    ),
)
def test_malformed_folder_of_wilds_is_named(
    name: str, file: str, pattern: str, replacement: str, message: str, tmp_path: Path
) -> None:
    write = {"iwildcam": write_iwildcam, "camelyon17": write_camelyon17}[name]
    path = write(tmp_path, 3)
    if name == "iwildcam":
        (path / "categories.csv").write_text(CATEGORIES)
    change_table(path / f"{file}.csv", pattern, replacement)

    assert check_refused(message, load, path, name, size=12).startswith("data.")


def test_official_splits_require_the_hospitals_of_wilds(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path, patches=1)
    file = path / "metadata.csv"
    file.write_text(re.sub(r",(\d),(\d)\n", r",site \1,\2\n", file.read_text()))

    assert refusal(load, path, "camelyon17") == (
        f"data.path: {file}: column 'center': expected the value '1' of data.splits, got 'site 0', "
        "'site 1', 'site 2', 'site 3', 'site 4'; set data.splits=pooled to use all rows for "
        "training"
    )
    assert len(groups_of(load(path, "camelyon17", splits="pooled"))) == 5


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path / "cameras")
    for folder, keys, message in (
        (tmp_path / "none", {}, r"data\.path: folder '.*none' not found"),
        (tmp_path, {}, r"data\.path: file '.*metadata\.csv' not found"),
        (path / "metadata.csv", {}, "expected a folder, got a file"),
        (path, {}, r"set data\.size to resize all images"),
        (path, {"group": "cam"}, "column 'cam' not found"),
    ):
        check_refused(message, load, folder, "iwildcam", **keys)


cell = st.text(st.characters(codec="utf-8", exclude_characters='"'), max_size=5) | st.sampled_from(
    ["0", "1", "-1", "1.5", "id_val", "train", "../x.jpg", "9" * 30, "NaN", ""]
)


@settings(
    max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.lists(cell, min_size=4, max_size=6), max_size=3),
    name=st.sampled_from(["iwildcam", "camelyon17"]),
)
def test_any_metadata_gives_one_line(rows: list[list[str]], name: str, tmp_path: Path) -> None:
    header = {
        "iwildcam": ["split", "location", "y", "filename"],
        "camelyon17": ["patient", "node", "x_coord", "y_coord", "tumor", "center", "split"],
    }[name]
    lines = [",".join(f'"{value}"' for value in row) for row in [header, *rows]]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")

    assert refusal(load, tmp_path, name).startswith("data.")


def test_folder_of_drives_names_the_replacement(tmp_path: Path) -> None:
    check_refused("folders of drives were removed; use image_table", load, tmp_path, "driving")
