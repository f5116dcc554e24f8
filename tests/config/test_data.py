"""Validation of data settings and of references in configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.config.data import SplitConfig
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.errors import UserError


def test_split_leaves_rows_to_train_on() -> None:
    assert SplitConfig(validation=0.25, test=0.5).test == 0.5
    for test in (0.75, 0.8):
        with pytest.raises(UserError, match="which leaves rows to train on"):
            SplitConfig(validation=0.25, test=test)


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("value", ["${" * 500 + "b" + "}" * 500, "[" * 300 + "]" * 300])
def test_deeply_nested_value_raises_one_line(value: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: {value if value[0] == '[' else repr(value)}\n")

    with pytest.raises(UserError, match=r"c.yaml: cannot be read: nested too deeply$"):
        load_config(path)
    with pytest.raises(UserError, match=r"name: (nested too deeply|invalid reference)"):
        load_config({}, [f"name={value}"])


def test_reference_to_another_key_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text('name: "${algorithm.name}-compared"\nalgorithm: {name: fedavg}\n')

    assert load_config(path).name == "fedavg-compared"
