"""Validation of data settings and of references in configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.config.data import SplitConfig
from hetero_fl.config.load import read_config_file
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case


def test_split_leaves_rows_to_train_on() -> None:
    assert SplitConfig(validation=0.25, test=0.5).test == 0.5
    for test in (0.75, 0.8):
        with pytest.raises(UserError, match="which leaves rows to train on"):
            SplitConfig(validation=0.25, test=test)


@each_case(
    "value",
    [
        "${oc.env:SECRET}",
        "${oc.env:SECRET,x}",
        "x ${oc.decode:'1'}",
        "${oc.${name}:SECRET}",
        "${${name}:SECRET}",
    ],
)
def test_reference_cannot_read_the_environment(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    path = tmp_path / "c.yaml"
    path.write_text(f'name: env\nalgorithm: {{name: "{value}"}}\n')
    line = r"may only refer to another key of the file, got "

    with pytest.raises(UserError, match=line) as caught:
        load_config(path)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    for given, overrides in (({"name": value}, ["rounds=2"]), ({}, [f"name={value}"])):
        with pytest.raises(UserError, match=line):
            load_config(given, overrides)


@each_case("value", ["${" * 500 + "b" + "}" * 500, "[" * 900 + "]" * 900])
def test_deeply_nested_value_raises_one_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: {value if value[0] == '[' else repr(value)}\n")

    with pytest.raises(UserError, match=r"c.yaml: (.*nested too deeply|\$\{…\} may)"):
        load_config(path)
    with pytest.raises(UserError, match=r"name: expected a YAML value"):
        load_config({}, [f"name={value}"])


def test_reference_to_another_key_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text('name: "${algorithm.name}-compared"\nalgorithm: {name: fedavg}\n')

    assert load_config(path).name == "fedavg-compared"


def test_aliases_and_references_of_usual_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    many = "".join(f"a{i}: [1, {{b: 2}}, '${{base}}/{i}', '${{root[0]}}']\n" for i in range(2000))
    path.write_text(many + "base: /srv\nroot: ['${base}/data']\npath: ${root.0}/a.csv\n")
    assert read_config_file(path)["path"] == "/srv/data/a.csv"

    path.write_text(
        "clients:\n  defaults: {model: &m {name: linear}, optimizer: {name: sgd, lr: 1e-2}}\n"
        "  groups: [{name: a, count: 2}, {name: b, count: 3, model: {<<: *m}}]\n"
        "name: ${clients.groups.1.name}-${clients.groups.0.count}\nrounds: ${seed}\nseed: 4\n"
    )

    config = load_config(path)

    assert (config.name, config.rounds, config.clients.groups[1].count) == ("b-2", 4, 3)
    assert config.clients.defaults.optimizer.lr == 0.01


def chain(first: str, level: str, count: int) -> str:
    """Return keys a0, a1, ... of which each refers to the one before."""
    levels = (
        f"a{i}: {level}".replace("NEW", f"a{i}").replace("OLD", f"a{i - 1}")
        for i in range(1, count)
    )
    return "\n".join([f"a0: {first}", *levels])


@each_case(
    ("text", "line"),
    [
        ("name: ${b}\n", "name: reference to unknown key 'b'"),
        ("name: ${clients.2}\n", r"name: reference to unknown key 'clients\.2'"),
        ("name: ${seed}\nseed: ${name}\n", "name: circular reference to 'seed'"),
        ("clients:\n  defaults: ${clients}\n", "clients.defaults: circular reference to 'clients'"),
        ("name: a\nname: b\n", "found duplicate key name"),
        ("a: &a [*a]\n", "recursive aliases are not supported"),
        (f"rounds: 1{22 * '0'}\n", "rounds: must be <= 1000000"),
        (chain("", "${OLD}${OLD}", 21), "references expand to too many values; write the values$"),
        (chain("", "${OLD}${OLD}", 33), "references expand to too many values; write the values$"),
        (chain("{}", "{x: '${OLD}', y: '${OLD}'}", 31), "references expand to too many values"),
        (chain("word", "${.OLD}${.OLD}", 33), "a1: reference to unknown key '.a0'"),
        ("name: ${oc.env:HOME}\n", "may only refer to another key of the file, got"),
        (chain("&a0 [x]", f"&NEW [{9 * '*OLD, '}]", 10), "YAML node expansion exceeds the confi"),
        (chain("&a0 {x: 1}", "&NEW {<<: [*OLD, *OLD]}", 33), "YAML node expansion exceeds the con"),
        (chain(f"[{20_000 * '0,'}]", 1000 * "${OLD}", 2), "references expand to too many values"),
        (f"name: '${{f:{10**6 * 'x,'}}}'\n", "expected references in at most 10,000 characters"),
    ],
)
def test_malformed_file_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)

    with pytest.raises(UserError, match=rf"c\.yaml.*: {line}|c\.yaml.*{line}"):
        load_config(path)
