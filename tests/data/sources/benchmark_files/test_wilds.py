"""JSON files of LEAF."""

from __future__ import annotations

import json
from functools import partial
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
from tests.support.benchmark_folders import (
    write_femnist,
    write_leaf_file,
)
from tests.support.cases import each_case
from tests.support.mistakes import check_refused


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


def test_file_in_place_of_a_folder(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name in ("htfllib", "leaf", "camelyon17", "iwildcam", "speech"):
        # The last one also reads .npz files.
        files = ["metadata.csv"] if name == "speech" else ["0.npz", "metadata.csv"]
        for file in files:
            with subtests.test(name=name, file=file):
                (tmp_path / file).write_bytes(b"0")

                check_refused(
                    f"data.path: .*{file}: expected a folder, got a file",
                    load,
                    tmp_path / file,
                    name,
                )


def test_clients_keep_their_test_rows(tmp_path: Path) -> None:
    path = write_femnist(tmp_path)
    content = json.loads((path / "test" / "all_data_0_test_9.json").read_text())["user_data"]

    data = load_federated_data(load_config(configuration(path, "leaf", 3)))

    found = {client: data.client_rows[client]["test"].copy_rows().x for client in data.client_ids}
    for client, user in zip(sorted(found), sorted(content), strict=False):
        assert torch.equal(found[client].flatten(1), torch.tensor(content[user]["x"]))
    assert all(data.n_rows(client, "validation") > 0 for client in data.client_ids)


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
            r"x: row 1: expected a list of 2 numbers, got \[1\]",
        ),
        (
            {"user_data": {"a": {"x": [0.5], "y": [0]}}},
            "x: row 0: expected a list of 1 number, got 0.5",
        ),
        (
            {"user_data": {"a": {"x": [ROW, None], "y": [0, 1]}}},
            "row 1: expected a list of 2 numbers, got None",
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
            r"x: row 0: expected a list of 5 numbers, got \['7', .*; of the data sets of LEAF, F",
        ),
        (
            {"user_data": {"a": {"x": [["a"]], "y": [0]}}},
            r"x: row 0: expected a list of 1 number, got \['a'\]",
        ),
        (
            {"user_data": {"a": {"x": [[1e999]], "y": [0]}}},
            r"a\.json: user 'a': x: row 0: infinite value",
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
            r"user 'b': x: expected rows of float32 and shape \(2,\) as in .* shape \(1,\)",
        ),
        (
            {"user_data": {"a": {"x": [ROW], "y": [0]}, "b": {"x": ["a"], "y": ["a"]}}},
            "user 'a': x: expected int64 tokens",
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
