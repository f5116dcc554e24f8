"""JSON files of LEAF."""

from __future__ import annotations

import json
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
from tests.support.benchmark_folders import write_femnist, write_leaf_file
from tests.support.cases import each_case


def load(path: Path) -> Dataset:
    return load_source(SourceConfig(name="leaf", path=str(path)), path)


def configuration(path: Path, clients: int, model: str, **data: Any) -> dict[str, Any]:
    return {
        "rounds": 1,
        "data": {
            "name": "leaf",
            "path": str(path),
            "partition": {"kind": "natural", "min_size": 2},
            **data,
        },
        "clients": {"count": clients, "defaults": {"model": model}},
        "algorithm": {"name": "fedavg"},
        "output": {"plots": False, "report": False},
    }


def test_femnist_is_read_as_images_of_62_classes(tmp_path: Path) -> None:
    dataset = load(write_femnist(tmp_path))

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

    data = load_federated_data(load_config(configuration(path, 3, "lenet")))

    found = {client: data.client_rows[client]["test"].copy_rows().x for client in data.client_ids}
    for client, user in zip(sorted(found), sorted(content), strict=False):
        assert torch.equal(found[client].flatten(1), torch.tensor(content[user]["x"]))
    assert all(data.n_rows(client, "validation") > 0 for client in data.client_ids)


def test_other_numbers_are_rows_of_a_table(tmp_path: Path) -> None:
    write_leaf_file(tmp_path / "train" / "a.json", {"u": ([[0.5, 1], [2, 3]], [0, 2])})

    dataset = load(tmp_path)

    assert dataset.train.x.tolist() == [[0.5, 1], [2, 3]] and dataset.test is None
    assert dataset.task.names == ("0", "2") and not dataset.local_sets


def test_characters_have_the_classes_of_leaf(tmp_path: Path) -> None:
    write_leaf_file(
        tmp_path / "train" / "a.json", {"u": (["ab\n", "b\n~", "x y"], ["A", "~", "\n"])}
    )

    dataset = load(tmp_path)

    assert dataset.vocabulary is not None and dataset.vocabulary.size == 82
    assert dataset.train.labels.tolist() == [LETTERS.index("A"), 0]
    assert dataset.train.x.tolist() == [
        [FIRST + LETTERS.index(c) for c in "ab\n"],
        [FIRST + LETTERS.index(c) for c in "x y"],
    ]
    assert dataset.task.outputs == 80 and dataset.task.names[:2] == ("newline", "space")
    write_leaf_file(tmp_path / "train" / "a.json", {"u": (["~~"], ["a"])})
    assert load(tmp_path).train.x.tolist() == [[UNKNOWN, UNKNOWN]]


def test_left_out_rows_and_users_are_noted(tmp_path: Path) -> None:
    users = {"u": (["ab", "bc", "cd"], ["A", "~", "~"]), "v": ([], [])}
    write_leaf_file(tmp_path / "train" / "a.json", users)
    write_leaf_file(tmp_path / "train" / ".a.json", users)

    assert load(tmp_path).notes == (
        "leaf: train: 2 rows left out, whose next character is unknown, of 'u'",
        "leaf: train: 1 user without rows: 'v'",
    )


def test_users_in_one_folder_only_are_not_local(tmp_path: Path) -> None:
    rows = ([[0.5, 1], [2, 3]], [0, 1])
    write_leaf_file(tmp_path / "train" / "a.json", {"u": rows, "v": rows})
    write_leaf_file(tmp_path / "test" / "a.json", {"w": rows})

    by_user = load(tmp_path)
    write_leaf_file(tmp_path / "test" / "b.json", {"v": rows, "empty": ([], [])})
    mixed = load(tmp_path)

    assert by_user.test is not None and len(by_user.test) == 2 and not by_user.local_sets
    assert mixed.test is not None and len(mixed.test) == 4
    assert mixed.local_sets["test"].group_names == ("v", "w")
    config = configuration(tmp_path, 2, "mlp", validation=0, split={"validation": 0})
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

    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)

    assert str(caught.value).startswith(f"data.path: {tmp_path}")


def test_missing_or_repeated_users_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: folder '.*none' not found"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"expected files train/\*\.json, found none"):
        load(tmp_path)
    for name in ("a", "b"):
        write_leaf_file(tmp_path / "train" / f"{name}.json", {"u": ([ROW], [0])})
    with pytest.raises(UserError, match=r"b\.json: user 'u': occurs twice in train"):
        load(tmp_path)


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
        load(tmp_path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        assert str(error).startswith("data.")
