"""Folders of Camelyon17 and iWildCam in the layout of WILDS, and JSON files of LEAF."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.dataset import FIRST, UNKNOWN
from hetero_fl.data.sources.benchmark_files.leaf import LETTERS
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.errors import UserError
from tests.support.benchmark_folders import (
    write_camelyon17,
    write_femnist,
    write_iwildcam,
    write_leaf_file,
)
from tests.support.cases import each_case
from tests.support.mistakes import check_refused, refusal


def load(path: Path, name: str = "camelyon17", **keys: Any) -> Dataset:
    return load_source(SourceConfig(name=name, path=str(path), **keys), path)


load_leaf = partial(load, name="leaf")


def configuration(path: Path, name: str, clients: int, **data: Any) -> dict[str, Any]:
    return {
        "rounds": 1,
        "data": {
            "name": name,
            "path": str(path),
            "partition": {"kind": "natural", "min_size": 2},
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

    check_refused(
        r"metadata\.csv: row \d+: label 2 is out of range 0 to 1", load, path, "iwildcam", size=12
    )


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

    caught = check_refused(message, load, path, "iwildcam", size=12)

    assert caught.startswith("data.path: ")


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

    caught = check_refused(message, load, path)

    assert caught.startswith("data.path: ")


def test_official_splits_require_the_hospitals_of_wilds(tmp_path: Path) -> None:
    path = write_camelyon17(tmp_path, patches=1)
    file = path / "metadata.csv"
    file.write_text(re.sub(r",(\d),(\d)\n", r",site \1,\2\n", file.read_text()))

    assert refusal(load, path) == (
        f"data.path: {file}: column 'center': expected the hospitals 1 (validation) and 2 (test), "
        "got 'site 0', 'site 1', 'site 2', 'site 3', 'site 4'; set data.splits=pooled to use all "
        "rows"
    )
    assert len(groups_of(load(path, splits="pooled"))) == 5


def test_file_in_place_of_a_folder(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name in ("htfllib", "leaf", "camelyon17", "iwildcam", "speech", "driving"):
        # The last two also read .npz files.
        files = ["metadata.csv"] if name in ("speech", "driving") else ["0.npz", "metadata.csv"]
        for file in files:
            with subtests.test(name=name, file=file):
                (tmp_path / file).write_bytes(b"0")

                check_refused(
                    f"data.path: .*{file}: expected a folder, got a file",
                    load,
                    tmp_path / file,
                    name,
                )


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    path = write_iwildcam(tmp_path / "cameras")
    for folder, keys, message in (
        (tmp_path / "none", {}, r"data\.path: folder '.*none' not found"),
        (tmp_path, {"name": "iwildcam"}, r"data\.path: file '.*metadata\.csv' not found"),
        (path, {"name": "iwildcam"}, r"set data\.size to resize all images"),
        (path, {"name": "iwildcam", "group": "cam"}, "column 'cam' not found"),
    ):
        check_refused(message, load, folder, **keys)
    text = (path / "metadata.csv").read_text().replace("train,", "id_val,")
    (path / "metadata.csv").write_text(text)
    check_refused("no row belongs to the split 'train'", load, path, "iwildcam", size=12)


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

    assert refusal(load, tmp_path, {"a": "iwildcam", "b": "camelyon17"}[name]).startswith("data.")


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


def test_femnist_is_read_as_images_of_62_classes(tmp_path: Path) -> None:
    dataset = load_leaf(write_femnist(tmp_path))

    assert dataset.train.x.shape == (72, 1, 28, 28) and dataset.train.x.dtype == torch.float32
    assert len(dataset.task.names) == 62 and dataset.task.names[61] == "z"
    assert dataset.train.group_names == ("f0000_14", "f0001_14", "f0002_14")
    assert set(dataset.train.labels.tolist()) == {0, 61}
    content = json.loads((tmp_path / "train" / "all_data_1_train_9.json").read_text())
    rows = dataset.train.group == 1
    expected = torch.tensor(content["user_data"]["f0001_14"]["x"])
    assert torch.equal(dataset.train.x[rows].flatten(1), expected)


def test_clients_keep_their_test_rows(tmp_path: Path) -> None:
    path = write_femnist(tmp_path)
    content = json.loads((path / "test" / "all_data_0_test_9.json").read_text())["user_data"]

    data = load_federated_data(load_config(configuration(path, "leaf", 3)))

    found = {client: data.client_rows[client]["test"].copy_rows().x for client in data.client_ids}
    for client, user in zip(sorted(found), sorted(content), strict=False):
        assert torch.equal(found[client].flatten(1), torch.tensor(content[user]["x"]))
    assert all(data.n_rows(client, "validation") > 0 for client in data.client_ids)


def test_other_numbers_are_rows_of_a_table(tmp_path: Path) -> None:
    write_leaf_file(tmp_path / "train" / "a.json", {"u": ([[0.5, 1], [2, 3]], [0, 2])})

    dataset = load_leaf(tmp_path)

    assert dataset.train.x.tolist() == [[0.5, 1], [2, 3]] and dataset.test is None
    assert dataset.task.names == ("0", "2") and not dataset.local_sets


def test_characters_have_the_classes_of_leaf(tmp_path: Path) -> None:
    write_leaf_file(
        tmp_path / "train" / "a.json", {"u": (["ab\n", "b\n~", "x y"], ["A", "~", "\n"])}
    )

    dataset = load_leaf(tmp_path)

    assert dataset.vocabulary is not None and dataset.vocabulary.size == 82
    assert dataset.train.labels.tolist() == [LETTERS.index("A"), 0]
    assert dataset.train.x.tolist() == [
        [FIRST + LETTERS.index(c) for c in "ab\n"],
        [FIRST + LETTERS.index(c) for c in "x y"],
    ]
    assert dataset.task.outputs == 80 and dataset.task.names[:2] == ("newline", "space")
    write_leaf_file(tmp_path / "train" / "a.json", {"u": (["~~"], ["a"])})
    assert load_leaf(tmp_path).train.x.tolist() == [[UNKNOWN, UNKNOWN]]


def test_left_out_rows_and_users_are_noted(tmp_path: Path) -> None:
    users = {"u": (["ab", "bc", "cd"], ["A", "~", "~"]), "v": ([], [])}
    write_leaf_file(tmp_path / "train" / "a.json", users)
    write_leaf_file(tmp_path / "train" / ".a.json", users)

    assert load_leaf(tmp_path).notes == (
        "leaf: train: 2 rows left out, whose next character is unknown, of 'u'",
        "leaf: train: 1 user without rows: 'v'",
    )


def test_users_in_one_folder_only_are_not_local(tmp_path: Path) -> None:
    rows = ([[0.5, 1], [2, 3]], [0, 1])
    write_leaf_file(tmp_path / "train" / "a.json", {"u": rows, "v": rows})
    write_leaf_file(tmp_path / "test" / "a.json", {"w": rows})

    by_user = load_leaf(tmp_path)
    write_leaf_file(tmp_path / "test" / "b.json", {"v": rows, "empty": ([], [])})
    mixed = load_leaf(tmp_path)

    assert by_user.test is not None and len(by_user.test) == 2 and not by_user.local_sets
    assert mixed.test is not None and len(mixed.test) == 4
    assert mixed.local_sets["test"].group_names == ("v", "w")
    config = configuration(tmp_path, "leaf", 2, validation=0, split={"validation": 0})
    data = load_federated_data(load_config(config))
    assert [data.n_rows(client, "test") for client in data.client_ids] == [0, 2]


ROW = [0.5, 1.0]


@each_case(
    ("content", "message"),
    (
        ("{", "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ("[]", "expected the keys users and user_data"),
        ({"user_data": [1]}, "expected the keys users and user_data"),
        ({"users": ["a"], "user_data": {"b": {}}}, "user 'a' of users not found in user_data"),
        ({"users": [3], "user_data": {}}, "users: expected a list of names"),
        ({"user_data": {"a": 3}}, "user 'a': expected the keys x and y, got 3"),
        ({"user_data": {"a": {"x": [ROW]}}}, "user 'a': y: expected a list"),
        ({"user_data": {"a": {"x": [ROW], "y": [0, 1]}}}, "y: expected 1 rows as in x, got 2"),
        ({"user_data": {"a": {"x": [ROW], "y": [0.5]}}}, "y: row 0: expected a class number"),
        (
            {"user_data": {"a": {"x": [ROW], "y": ["b"]}}},
            "y: row 0: expected a number, got 'b'",
        ),
        (
            {"user_data": {"a": {"x": [ROW, [1]], "y": [0, 1]}}},
            "x: row 1: expected 2 numbers, got 1",
        ),
        (
            {"user_data": {"a": {"x": [0.5], "y": [0]}}},
            "x: row 0: expected a list of numbers, got 0.5",
        ),
        (
            {"user_data": {"a": {"x": [ROW, None], "y": [0, 1]}}},
            "row 1: expected 2 numbers, got None",
        ),
        (
            {"user_data": {"a": {"x": [ROW], "y": [True]}}},
            "y: row 0: expected a number, got True",
        ),
        (
            {"user_data": {"a": {"x": ["000123.jpg"], "y": ["0"]}}},
            "got the image file '000123.jpg'; of the data sets of LEAF, FEMNIST",
        ),
        (
            {"user_data": {"a": {"x": [["7", "Mon", "NO_QUERY", "a", "hi"]], "y": [4]}}},
            "x: row 0: expected a number, got '7'; of the data sets of LEAF, FEMNIST",
        ),
        (
            {"user_data": {"a": {"x": [["a"]], "y": [0]}}},
            "x: row 0: expected a number, got 'a'",
        ),
        (
            {"user_data": {"a": {"x": [[1e999]], "y": [0]}}},
            r"a\.json: user 'a': x: row 0: NaN or infinite value",
        ),
        (
            {"user_data": {"a": {"x": [ROW], "y": [-1]}}},
            r"a\.json: user 'a': y: row 0: label -1 is out of range",
        ),
        ({"user_data": {"a": {"x": [ROW], "y": [10**30]}}}, "y: "),
        ({"user_data": {"a": {"x": ["abc"], "y": [0]}}}, "y: row 0: expected the character"),
        (
            {"user_data": {"a": {"x": ["abc", "ab"], "y": ["a", "b"]}}},
            "x: row 1: expected a text",
        ),
        ({"user_data": {"a": {"x": ["ab", 3], "y": ["a", "b"]}}}, "x: row 1: expected a text"),
        (
            {"user_data": {"a": {"x": [ROW], "y": [0]}, "b": {"x": [[1]], "y": [0]}}},
            "user 'b': x: expected rows of 2 numbers as for the first user, got 1 numbers",
        ),
        (
            {"user_data": {"a": {"x": [ROW], "y": [0]}, "b": {"x": ["a"], "y": ["a"]}}},
            "got 1 characters",
        ),
        ({"user_data": {}}, "no user in train has rows"),
        ({"user_data": {"a": {"x": ["a"], "y": ["~"]}}}, "no user in train has rows"),
    ),
)
def test_malformed_files_are_named(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "train" / "a.json").write_text(text)

    caught = check_refused(message, load_leaf, tmp_path)

    assert caught.startswith(f"data.path: {tmp_path}")


def test_missing_or_repeated_users_are_named(tmp_path: Path) -> None:
    check_refused(r"data\.path: folder '.*none' not found", load_leaf, tmp_path / "none")
    check_refused(r"expected files train/\*\.json, found none", load_leaf, tmp_path)
    for name in ("a", "b"):
        write_leaf_file(tmp_path / "train" / f"{name}.json", {"u": ([ROW], [0])})
    check_refused(r"b\.json: user 'u': occurs twice in train", load_leaf, tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "y", "users", "user_data", "u"]), inner, max_size=3)
    ),
    max_leaves=8,
)
user_rows = st.fixed_dictionaries(
    {"x": json_values | st.lists(json_values, max_size=3), "y": json_values | st.lists(json_values)}
)
contents = json_values | st.fixed_dictionaries(
    {"user_data": st.dictionaries(st.text(max_size=3), user_rows | json_values, max_size=2)},
    optional={"users": json_values},
)


@settings(
    max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=contents)
def test_any_content_is_read_or_gives_one_line(content: Any, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir(exist_ok=True)
    (tmp_path / "train" / "a.json").write_text(json.dumps(content))

    try:
        load_leaf(tmp_path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        assert str(error).startswith("data.")
