"""Versions of the configuration, keys with former names, and configurations of older runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

import hetero_fl
from hetero_fl import load_config
from hetero_fl.algorithms import register_algorithm
from hetero_fl.cli import main
from hetero_fl.config import Config, resolve_config
from hetero_fl.config.describe import section_at
from hetero_fl.experiment import runner
from hetero_fl.experiment.configuration import describe_changes
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import config


@each_case("raw", [{"rounds": 3}, {"rounds": 3, "version": 1}])
def test_version_is_optional_and_saved(raw: dict[str, Any]) -> None:
    config = load_config(raw)

    assert resolve_config(config)["version"] == 1
    assert load_config(resolve_config(config)) == config


DEPRECATED = {
    "algorithm.distil_epochs": (  # style: ok (former name)
        {"algorithm": {"name": "feddf", "distil_epochs": 2}},  # style: ok (former name)
        "algorithm.distill_epochs",
    ),
}


@pytest.mark.filterwarnings("default")
@each_case("key", DEPRECATED)
def test_command_and_log_show_a_deprecated_key_once(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, new = DEPRECATED[key]
    output = {"plots": False, "report": False}
    source = {**config(models="mlp", rounds=1), **written, "output": output}
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(source), encoding="utf-8")

    assert main(["train", "-c", str(file), "--out", str(tmp_path / "run")]) == 0

    line = f"warning: {key}: deprecated; use {new}"
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert shown == [line]
    assert (tmp_path / "run" / "log.txt").read_text("utf-8").count(line) == 1


# Sections with removed keys.
SECTIONS = {
    "data": {"name": "digits", "speech": {}, "movies": {}, "driving": {}},
    "channel": {"compress": [{"quantize": 8}], "secure_sum": {}},
    "devices": {},
    "faults": {},
}
METHODS = [name for name in register_algorithm if register_algorithm[name]._removed]
MANY = {
    "channel.entropy": False,
    "cohort.attempts": 10,
    "cohort.partial_work": False,
    "devices.file": None,
    "faults.server": [],
    "output.tensorboard": False,
}


def removed_keys(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the removed keys of all sections of a configuration, and their former defaults."""
    for key, value in dict(enumerate(tree) if isinstance(tree, list) else tree).items():
        if isinstance(value, Mapping | list):
            yield from removed_keys(value, (*path, str(key)))
    section: Any = None if isinstance(tree, list) else section_at(Config, path)
    if path == ("algorithm",):
        section = register_algorithm[tree["name"]]
    for key in getattr(section, "_removed", {}):
        yield ".".join([*path, key]), section._former_defaults.get(key)


def with_value(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of a configuration with another value of a key."""
    copy = dict(deepcopy(tree))
    *sections, key = path.split(".")
    place: Any = copy
    for name in sections:
        place = place[int(name) if name.isdigit() else name]
    place[key] = value
    return copy


def with_many(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as an earlier version saved it."""
    for path, value in MANY.items():
        tree = with_value(tree, path, value)
    del tree["clients"]["defaults"]["share_every"]
    return dict(tree)


@contextmanager
def as_an_earlier_version() -> Iterator[None]:
    """Save the configurations of runs as an earlier version did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "resolve_config", lambda loaded: with_many(resolve_config(loaded)))
        yield


@pytest.mark.parametrize("method", METHODS)
def test_removed_keys_with_their_former_defaults_are_no_change(
    method: str, subtests: pytest.Subtests
) -> None:
    loaded = load_config({**SECTIONS, "clients": {"count": 2}, "algorithm": {"name": method}})
    current = resolve_config(loaded)
    removed = dict(removed_keys(current))

    assert removed.keys() > {*MANY, "channel.secure_sum.neighbors", "data.movies.sampled"}
    for path, default in removed.items():
        with subtests.test(path=path):
            for value in (default, None):
                assert describe_changes(with_value(current, path, value), current) is None
            message = f"{path} was removed; use "
            for value in (3.5, "all", {"a": 1}):
                saved = with_value(current, path, value)
                with pytest.raises(UserError, match=f"^configuration: {message}"):
                    load_config(saved)
                with pytest.raises(UserError, match=f"^{message}"):
                    load_config(current, [f"{path}={value}"])
                # The output does not affect results.
                line = describe_changes(saved, current) or "output." * path.startswith("output.")
                assert line.startswith((message, "output."))


def test_a_run_of_an_earlier_version_is_resumed_and_extended(tmp_path: Path) -> None:
    source = config("local", "linear", 2, rounds=1, devices={}, faults={})
    with as_an_earlier_version():
        run = hetero_fl.run(source, out=tmp_path / "run", quiet=True)

    assert run.config()["channel"]["entropy"] is False
    hetero_fl.run(source, out=run.path, resume=True, quiet=True)
    with pytest.raises(UserError, match=r"differs: seed: was 0, is now 1$"):
        hetero_fl.run({**source, "seed": 1}, out=run.path, resume=True, quiet=True)
    extended = hetero_fl.run({**source, "rounds": 2}, out=run.path, resume=True, quiet=True)
    assert [record["round"] for record in extended.metrics] == [1, 2]


def test_a_comparison_reuses_runs_of_an_earlier_version(tmp_path: Path) -> None:
    source = config("local", "linear", 2, rounds=1, devices={}, faults={})
    file = tmp_path / "runs" / "local-seed0" / "config.yaml"
    # As in a comparison.
    settings = ["runtime.threads=1", "output.best_models=false"]
    with as_an_earlier_version():
        hetero_fl.run(source, overrides=settings, out=file.parent, quiet=True)
    before = file.read_text()

    made = hetero_fl.compare(source, "local", "0", out=tmp_path, jobs=1, quiet=True)

    assert [run.path for run in made.runs] == [file.parent]
    assert file.read_text() == before
    changed = with_value(yaml.safe_load(before), "channel.entropy", True)
    file.write_text(yaml.safe_dump(changed))
    with pytest.raises(UserError, match=r"has other settings \(channel.entropy was removed; use t"):
        hetero_fl.compare(source, "local", "0", out=tmp_path, jobs=1, quiet=True)


def test_code_that_only_the_saved_configuration_names_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "saved_code.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    current = resolve_config(load_config(config("local", "linear", 2)))

    saved = with_value(current, "algorithm.name", "python:saved_code:Method")

    line = describe_changes(saved, current)
    assert line == "algorithm.name: was 'python:saved_code:Method', is now 'local'"
    assert "saved_code" not in sys.modules
