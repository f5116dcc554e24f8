"""Suggestions of the nearest key, and hints on lists and mappings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError


def error_message(tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(tree, overrides)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value).removeprefix("configuration: ")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.paht=x.npz", "data.paht: unknown key; did you mean 'path'?"),
        ("path=x.npz", "path: unknown key; did you mean 'data.path'?"),
        ("round=3", "round: unknown key; did you mean 'rounds'?"),
        ("clients.round=3", "clients.round: unknown key; did you mean 'clients.per_round'?"),
        ("data_path=x.npz", "did you mean 'data.path'?"),
        ("data.partition.path=x.npz", "did you mean 'data.path'?"),
        ("data.alpha=0.5", "data.alpha: unknown key; did you mean 'data.partition.alpha'?"),
        ("data.sizes=100", "did you mean 'size'?"),
        ("proxy_size=100", "did you mean 'data.proxy.size'?"),
        ("data.partition.size=9", "did you mean 'min_size' or 'data.size'?"),
        ("data.proxy.path=x.npz", "did you mean 'data.proxy.source.path'?"),
        ("clients.defaults.lr=0.1", "did you mean 'clients.defaults.optimizer.lr'?"),
        (
            "clients.groups.1.lr=0.1",
            "clients.groups.1.lr: unknown key; did you mean 'clients.groups.1.optimizer.lr'?",
        ),
        ("lr=0.1", "did you mean 'clients.defaults.optimizer.lr'?"),
        ("clients.defaults.momentun=0.9", "did you mean 'clients.defaults.optimizer.momentum'?"),
        ("server.lr=0.1", "did you mean 'server.optimizer.lr'?"),
        ("temperature=3", "did you mean 'algorithm.temperature'?"),
        (
            "algorithm.rounds=3",
            "algorithm.rounds: unknown key; did you mean 'rounds'? (algorithm.name=fedmd)",
        ),
        ("algorithm.temprature=3", "did you mean 'temperature'? (algorithm.name=fedmd)"),
        ("evaluation.device=cpu", "did you mean 'runtime.device'?"),
        ("runtime.qqq=1", "unknown key; choose from address, buffer, chunk, deterministic"),
        (
            "algorithm.temp=3",
            "algorithm.temp: unknown key; did you mean 'temperature'? (algorithm.name=fedmd)",
        ),
        ("algorithm.windws=3", "algorithm.windws: unknown key; choose from "),
        (
            "data.partition.kind=non-iid",
            "data.partition.kind: unknown value 'non-iid'; choose from classes, dirichlet, drawn,",
        ),
    ],
)
def test_unknown_key_suggests_nearest_key(override: str, meant: str) -> None:
    groups = [{"name": "a"}, {"name": "b", "model": "mlp"}]
    assert meant in error_message(
        {"clients": {"groups": groups}, "algorithm": {"name": "fedmd"}}, override
    )


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("test", "drives/test", "set the file or folder for all clients in data.path"),
        ("common", "drives/test", "set the file or folder for all clients in data.path"),
        ("pth", "drives/test", "did you mean 'path'?"),
        ("gap", 5, "did you mean 'data.driving.gap'?"),
        ("length", 5, "choose from categories, columns, driving, follow_links"),
    ],
)
def test_unknown_key_of_data_suggests_no_section_of_another_source(
    key: str, value: object, hint: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config({"data": {"name": "driving", key: value}})

    assert f"data.{key}: unknown key; {hint}" in str(error.value)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"data": "digits"}, "data: expected a mapping, got 'digits'; did you mean 'data.name'?"),
        (
            {"data": {"partition": "iid"}},
            "data.partition: expected a mapping, got 'iid'; did you mean 'data.partition.kind'?",
        ),
        (
            {"algorithm": "fedmd"},
            "algorithm: expected a mapping, got 'fedmd'; did you mean 'algorithm.name'?",
        ),
        (
            {"algorithm": [{"name": "fedmd"}]},
            "algorithm: expected a mapping, got [{'name': 'fedmd'}]; write its keys without dashes",
        ),
        (
            {"clients": [{"name": "a"}]},
            "clients: expected a mapping, got [{'name': 'a'}]; did you mean 'clients.groups'?",
        ),
        (
            {"clients": {"defaults": {"optimizer": [{"lr": 0.1}]}}},
            "clients.defaults.optimizer: expected a mapping, got [{'lr': 0.1}]; write",
        ),
        (
            {"data": [{"name": "digits"}]},
            "data: expected a mapping, got [{'name': 'digits'}]; write its keys without dashes",
        ),
        (
            {"data": {"proxy": 100}},
            "data.proxy: expected a mapping, got 100; its keys are size, source, columns",
        ),
        (
            {"channel": {"secure_sum": True}},
            "channel.secure_sum: expected a mapping, got true; "
            "write {} for the defaults, or set threshold,",
        ),
        ({"privacy": True}, "privacy: expected a mapping, got true; its keys are unit"),
        ({"privacy": {"delta": 0.1}}, "privacy: set target_epsilon or noise_multiplier"),
        ({"data": None}, "data: expected a mapping, got null; its keys are"),
        (
            {"clients": {"groups": {"a": {"count": 2}}}},
            "clients.groups: expected a list, got a mapping; "
            "begin each entry of the list with a dash",
        ),
        (
            {"clients": {"groups": ["a"]}},
            "clients.groups.0: expected a mapping, got 'a'; did you mean 'clients.groups.0.name'?",
        ),
        (
            {"clients": {"defaults": {"shares": {"a": 1}}}},
            "clients.defaults.shares: expected a list, got a mapping;",
        ),
    ],
)
def test_wrong_kind_of_value_names_the_key_to_set(tree: dict[str, Any], line: str) -> None:
    assert line in error_message(tree)


@pytest.mark.parametrize(("names", "count"), [("ab", 2), ("a", 1)])
def test_index_out_of_range_names_the_length(names: str, count: int) -> None:
    override = "clients.groups.7.model=mlp"
    line = error_message({"clients": {"groups": [{"name": n} for n in names]}}, override)
    assert line == (
        f"clients.groups.7.model: index 7 is out of range, clients.groups has length {count}"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("clients.groups.cnn.model=mlp", "for 'cnn' write clients.groups.1.model"),
        ("clients.groups.cn.model=mlp", "for 'cnn' write clients.groups.1.model"),
        (
            "clients.groups.vit.model=mlp",
            "clients.groups.0 is 'big', clients.groups.1 is 'cnn'",
        ),
    ],
)
def test_entry_addressed_by_name_suggests_its_index(override: str, expected: str) -> None:
    line = error_message({"clients": {"groups": [{"name": "big"}, {"name": "cnn"}]}}, override)

    key = override.partition("=")[0]
    assert line == f"{key}: entries of clients.groups are counted from 0; {expected}"


@pytest.mark.parametrize("seeds", ["0,1", "[0,1]"])
def test_several_seeds_suggest_compare(seeds: str) -> None:
    assert error_message({}, f"seed={seeds}").endswith(
        "; for several seeds use `hetero-fl compare --seeds 0,1`"
    )


def test_missing_file_lists_the_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("digits.yaml", "medical.json", "notes.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")

    found = []
    for path in (tmp_path / "zzz.yaml", tmp_path / "digit.yaml", tmp_path, tmp_path / "empty.yaml"):
        with pytest.raises(UserError) as error:
            load_config(path)
        found.append(str(error.value).replace(f"{path}: ", ""))

    listed = "the folder contains digits.yaml, empty.yaml, medical.json"
    assert found == [
        f"file not found; {listed}",
        "file not found; did you mean 'digits.yaml'?",
        f"expected a file, got a folder; {listed}",
        "has no keys; expected at least data, clients and algorithm",
    ]


def test_overrides_may_be_a_string_or_a_dictionary() -> None:
    assert load_config({}, "rounds=1").rounds == 1
    given = {
        "rounds": 2,
        "data.name": "digits",
        "algorithm": {"name": "fedprox", "mu": 0.5},
        "privacy": None,
    }
    config = load_config({}, given)
    assert (config.rounds, config.data.name, config.privacy) == (2, "digits", None)
    assert config.algorithm["name"] == "fedprox" and config.algorithm["mu"] == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("rounds", r"overrides: expected key.path=value, got 'rounds'"),
        (["seed=1", "rounds", "3"], r"got 'rounds'; did you mean 'rounds=3'\?"),
        ([3], r"overrides: expected strings key.path=value, got 3"),
    ],
)
def test_invalid_overrides_are_refused(overrides: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config({}, overrides)


def test_error_names_the_file_or_override_of_the_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("rounds: two\nalgorithm: {name: fedprox, mu: x}\n")
    for overrides, expected in (
        ([], f"{file}: rounds: expected an integer, got 'two'"),
        (["seed=1"], f"{file}: rounds: expected an integer, got 'two'"),
        (["rounds=1", "rounds=three"], "rounds: expected an integer, got 'three'"),
        (["rounds=1", "algorithm.seed=1"], "algorithm.seed: unknown key"),
        (["rounds=1"], f"{file}: algorithm.mu: expected a number, got 'x'"),
        (
            ["rounds=1", "algorithm={name: fedprox, mu: -1}"],
            "algorithm={name: fedprox, mu: -1}: algorithm.mu: must be >= 0, got -1",
        ),
        (
            ["rounds=1", "algorithm.name=fedvag"],
            "algorithm.name: unknown algorithm 'fedvag'",
        ),
    ):
        with pytest.raises(UserError) as error:
            load_config(file, overrides)
        assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["privacy.delta=0.1"],
            "privacy.delta=0.1: privacy: set target_epsilon or noise_multiplier",
        ),
        (
            ["seed=1", "data.split.test=0.9", "rounds=2"],
            "data.split.test=0.9: data.split: validation + test must be < 1",
        ),
        (
            ["clients.groups.0.fraction=0.5"],
            (
                "clients.groups.0.fraction=0.5: clients.groups.0: "
                "count cannot be combined with fraction"
            ),
        ),
        (["foo.a=1", "foo.b=2", "rounds=2"], "foo.b=2: foo: unknown key"),
        (
            ["split.test=0.9", "split.validation=0.5"],
            "split.validation=0.5: split: unknown key; did you mean",
        ),
        (
            ["data.validation=0.5", "data.split={test: 0.9}"],
            "data.split: validation + test",
        ),
    ],
)
def test_load_config_error_names_the_override(
    overrides: list[str], expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("clients: {groups: [{name: a, count: 2}]}\n")

    with pytest.raises(UserError) as error:
        load_config(file, overrides)

    assert str(error.value).startswith(expected)


def test_load_config_error_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("privacy: {delta: 0.1}\n")

    with pytest.raises(UserError) as error:
        load_config(file, ["rounds=2", "clients.groups=[{name: a}]", "clients.groups.0.count=3"])

    assert str(error.value).startswith(f"{file}: privacy: set target_epsilon")


def test_load_config_refuses_an_integer_that_python_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"rounds: {'9' * 5000}\n")

    with pytest.raises(UserError, match=r"c\.yaml: cannot be read: "):
        load_config(file)


def test_override_with_a_list_for_a_mapping() -> None:
    assert "data: expected a mapping, got [1, 2]" in error_message({}, "data=[1,2]")
    assert "data" in error_message({"data": [1]}, "data.path=x.npz")
    assert "clients" in error_message(
        {"clients": {"groups": {"a": 1}}}, "clients.groups.0.epochs=3"
    )
