"""Methods, data sources and loggers that other packages provide through entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hetero_fl import load_config, run
from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.cli import main
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import list_sources, load_source, registry
from hetero_fl.reporting.loggers import register_logger
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import Registry
from model_zoo.plugins import PluginWarning
from tests.support.plugins import install

CODE = '''
import torch
from hetero_fl.algorithms import FedAvg
from hetero_fl.data import from_arrays, register_source

class Slower(FedAvg):
    """Average slowly."""
    title = "Slower"

def blobs(config, root):
    y = torch.arange(200) % 2
    return from_arrays(torch.randn(200, 4) + y[:, None], y, name="blobs")

@register_source("sized", keys=("size",))
def sized(config, root):
    return blobs(config, root)

def wrong(config, root):
    return 3
'''
LOGGER = '''
from hetero_fl import Logger

class Lines(Logger):
    """Count rounds."""
    start_at: int = 0

    def start(self, run):
        self._path = run.path / "lines.txt"

    def log(self, record):
        with open(self._path, "a") as file:
            file.write(f"{self.start_at + record['round']} ")

    _path: object = None
'''
Install = Callable[..., None]


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a package with plug-ins until the end of the test."""
    monkeypatch.delitem(sys.modules, "other_package", raising=False)
    for owner, name in (
        (register_algorithm, "_known"),
        (registry.sources, "_known"),
        (register_logger, "_known"),
    ):
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    groups: Any = (register_algorithm.plugins, register_logger.plugins, registry.sources.plugins)

    def refresh() -> None:
        for group in groups:
            group.refresh()

    def install_package(code: str = CODE, **references: str) -> None:
        found: dict[str, dict[str, str]] = {}
        for name, reference in references.items():
            group, _, kind = reference.partition(":")
            found.setdefault(f"hetero_fl.{group}", {})[name] = f"other_package:{kind}"
        install(tmp_path, monkeypatch, found, code)
        refresh()

    yield install_package
    refresh()


def test_method_is_listed_with_its_package(
    plugins: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins(slower="algorithms:Slower")
    monkeypatch.setenv("COLUMNS", "200")

    assert main(["methods"]) == 0

    lines = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.split()[:1] == ["slower"]]
    assert lines[place].split(maxsplit=1)[1].strip() == "Average slowly."
    assert "from other_package 1.0" in lines[place + 1]


def test_method_and_logger_are_imported_when_they_are_looked_up(plugins: Install) -> None:
    plugins(CODE + LOGGER, slower="algorithms:Slower", lines="loggers:Lines")

    assert "fedavg" in register_algorithm
    load_config({"output": {"loggers": ["csv"]}})
    assert "other_package" not in sys.modules
    assert "slower" in register_algorithm
    assert register_algorithm["slower"].title == "Slower"
    load_config({"output": {"loggers": ["lines"]}})
    assert "lines" in list(register_logger)


def test_run_uses_method_source_and_logger_of_plugins(plugins: Install, tmp_path: Path) -> None:
    plugins(CODE + LOGGER, slower="algorithms:Slower", blobs="sources:blobs", lines="loggers:Lines")
    logger = {"kind": "lines", "start_at": 10}
    config = {
        "rounds": 2,
        "data": {"name": "blobs"},
        "clients": {"count": 2, "defaults": {"model": "mlp"}},
        "algorithm": {"name": "slower"},
        "output": {"plots": False, "report": False, "loggers": [logger]},
    }

    finished = run(config, out=tmp_path / "run")

    assert finished.summary["algorithm"] == "slower"
    assert (finished.path / "lines.txt").read_text() == "11 12 "


@pytest.mark.filterwarnings("default")
def test_broken_method_warns_and_the_others_are_listed(
    plugins: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins("1 / 0", slower="algorithms:Slower")

    assert main(["methods"]) == 0
    names = list(register_algorithm)

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: algorithm 'slower' of other_package 1.0 cannot be loaded: Zero"
    )
    assert "slower" not in names and "fedavg" in names
    assert "slower" not in register_algorithm
    with pytest.raises(UserError, match=r"cannot be loaded: ZeroDivisionError: division by zero$"):
        register_algorithm["slower"]


def test_class_that_is_no_method_is_refused(plugins: Install) -> None:
    plugins("class Slower: pass", slower="algorithms:Slower")

    with pytest.raises(UserError, match=r"not valid: expected a subclass of hetero_fl\.alg"):
        register_algorithm["slower"]


def test_built_in_names_are_refused(plugins: Install) -> None:
    plugins(fedavg="algorithms:Slower", digits="sources:Slower", csv="loggers:Slower")

    for name, names in (
        ("fedavg", register_algorithm),
        ("digits", registry),
        ("csv", register_logger),
    ):
        refused = rf"^.* '{name}' of other_package 1.0: '{name}' is a bui"
        with pytest.warns(PluginWarning, match=refused):
            found = list_sources() if names is registry else list(names)
        assert found.count(name) == 1
    assert "other_package" not in sys.modules


def test_decorator_refuses_a_built_in_name_and_replaces_a_class_of_the_program() -> None:
    known: Registry[type[Algorithm]] = Registry("algorithm", lambda: Algorithm)
    first, second = type("First", (Algorithm,), {}), type("Second", (Algorithm,), {})

    known("mine")(first)
    known("mine")(second)

    assert known["mine"] is second
    with pytest.raises(ValueError, match="'fedavg' is a built-in algorithm; choose another name"):
        register_algorithm("fedavg")(first)


def test_sources_of_plugins_are_loaded_by_name_or_refused_in_one_line(
    plugins: Install, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    named = {name: f"sources:{name}" for name in ("blobs", "sized", "missing", "wrong")}
    plugins(**named)
    assert len(load_source(SourceConfig(name="blobs"), tmp_path).train) == 200
    assert len(load_source(SourceConfig(name="sized", size=3), tmp_path).train) == 200
    with pytest.warns(PluginWarning, match="'missing' of other_package 1.0 cannot be loaded"):
        assert {"blobs", "sized", "wrong"} < set(list_sources())

    for source, message in (
        ({"name": "missing"}, r"^data\.name: data source 'missing' of other_package 1\."),
        ({"name": "blobs", "size": 3}, "does not apply to source blobs"),
        ({"name": "blob"}, "unknown source 'blob'; did you mean 'blobs'"),
        ({"name": "wrong"}, r"^data\.name: wrong: expected .*Dataset, got int$"),
    ):
        with subtests.test(**source), pytest.raises(UserError, match=message):
            load_source(SourceConfig.model_validate(source), tmp_path)


@pytest.mark.parametrize(
    ("code", "entry", "message"),
    [
        (LOGGER, "line", "output.loggers.0.kind: unknown logger 'line'; did you mean 'lines'?"),
        (LOGGER, {"kind": "lines", "start_att": 1},
         "output.loggers.0.start_att: unknown key; did you mean 'start_at'? (kind=lines)"),
        ("1 / 0", "lines", "output.loggers.0.kind: logger 'lines' of other_package 1.0 cannot be "
         "loaded: ZeroDivisionError: division by zero"),
        ("class Lines: pass", "lines", "output.loggers.0.kind: logger 'lines' of other_package 1.0 "
         "is not valid: expected a subclass of hetero_fl.reporting.loggers.Logger"),
    ],
)  # fmt: skip
def test_mistakes_with_the_logger_of_a_plugin_are_one_line(
    plugins: Install, code: str, entry: object, message: str
) -> None:
    plugins(code, lines="loggers:Lines")

    with pytest.raises(UserError) as caught:
        load_config({"output": {"loggers": [entry]}})

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
