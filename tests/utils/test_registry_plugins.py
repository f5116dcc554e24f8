"""Methods, data sources and loggers that other packages provide through entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hetero_fl import load_config, run
from hetero_fl.algorithms import Algorithm, register_algorithm
from hetero_fl.cli import main
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import check_source, list_sources, load_source, registry
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

@register_source("sized", keys=("size",), generates=True)
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
LOGGERS = {"hetero_fl.loggers": {"lines": "other_package:Lines"}}
METHODS = {"hetero_fl.algorithms": {"slower": "other_package:Slower"}}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Search for plug-ins again, and undo what the plug-ins of a test register."""
    monkeypatch.delitem(sys.modules, "other_package", raising=False)
    monkeypatch.setattr(register_algorithm, "_known", dict(register_algorithm._known))
    monkeypatch.setattr(registry, "_sources", dict(registry._sources))
    monkeypatch.setattr(register_logger, "_known", dict(register_logger._known))
    assert register_algorithm.plugins is not None
    assert register_logger.plugins is not None
    groups = (register_algorithm.plugins, register_logger.plugins, registry.PLUGINS)
    for plugins in groups:
        plugins.refresh()
    yield
    for plugins in groups:
        plugins.refresh()


def install_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    references = {name: f"other_package:{name}" for name in names}
    install(tmp_path, monkeypatch, {"hetero_fl.sources": references}, CODE)


def test_method_is_listed_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, METHODS, CODE)
    monkeypatch.setenv("COLUMNS", "200")

    assert main(["methods"]) == 0

    lines = capsys.readouterr().out.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.split()[:1] == ["slower"]]
    assert lines[place].split(maxsplit=1)[1].strip() == "Average slowly."
    assert "from other_package 1.0" in lines[place + 1]


def test_method_is_imported_when_it_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, METHODS, CODE)

    assert "fedavg" in register_algorithm
    assert "other_package" not in sys.modules
    assert "slower" in register_algorithm
    assert register_algorithm["slower"].title == "Slower"


def test_run_uses_method_and_source_of_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = METHODS | {"hetero_fl.sources": {"blobs": "other_package:blobs"}}
    install(tmp_path, monkeypatch, groups, CODE)
    config = {
        "rounds": 1,
        "data": {"name": "blobs"},
        "clients": {"count": 2, "defaults": {"model": "mlp"}},
        "algorithm": {"name": "slower"},
        "output": {"plots": False, "report": False},
    }

    assert run(config, out=tmp_path / "run").summary["algorithm"] == "slower"


def test_broken_method_warns_and_the_others_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, METHODS, "1 / 0")

    with pytest.warns(PluginWarning, match=r"^algorithm 'slower' of other_package 1\.0 cannot"):
        names = list(register_algorithm)

    assert "slower" not in names and "fedavg" in names
    assert "slower" not in register_algorithm
    with pytest.raises(UserError, match=r"cannot be loaded: ZeroDivisionError: division by zero$"):
        register_algorithm["slower"]


@pytest.mark.filterwarnings("default")
def test_command_prints_the_warning_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, monkeypatch, METHODS, "1 / 0")

    assert main(["methods"]) == 0

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: algorithm 'slower' of other_package 1.0 cannot be loaded: Zero"
    )


def test_class_that_is_no_method_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, METHODS, "class Slower: pass")

    with pytest.raises(UserError, match=r"not valid: expected a subclass of hetero_fl\.alg"):
        register_algorithm["slower"]


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("hetero_fl.algorithms", "fedavg"),
        ("hetero_fl.sources", "digits"),
        ("hetero_fl.loggers", "csv"),
    ],
)
def test_built_in_names_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, name: str
) -> None:
    install(tmp_path, monkeypatch, {group: {name: "other_package:Slower"}}, CODE)

    with pytest.warns(
        PluginWarning, match=rf"^.* '{name}' of other_package 1.0: '{name}' is a bui"
    ):
        names = [*register_algorithm, *list_sources(), *register_logger]

    assert names.count(name) == 1
    assert "other_package" not in sys.modules


def test_decorator_refuses_a_built_in_name() -> None:
    with pytest.raises(ValueError, match="'fedavg' is a built-in algorithm; choose another name"):

        @register_algorithm("fedavg")
        class FedAvg(Algorithm):
            """Average."""


def test_decorator_replaces_a_class_of_the_program() -> None:
    known: Registry[type[Algorithm]] = Registry("algorithm", lambda: Algorithm)

    class First(Algorithm):
        """First."""

    class Second(Algorithm):
        """Second."""

    known("mine")(First)
    known("mine")(Second)

    assert known["mine"] is Second


def test_source_of_a_plugin_is_loaded_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_sources(tmp_path, monkeypatch, "blobs", "sized")

    assert len(load_source(SourceConfig(name="blobs"), tmp_path).train) == 200
    assert len(load_source(SourceConfig(name="sized", size=3), tmp_path).train) == 200
    assert {"blobs", "sized"} < set(list_sources())
    with pytest.raises(UserError, match="does not apply to source blobs"):
        load_source(SourceConfig(name="blobs", size=3), tmp_path)


def test_unknown_source_suggests_the_source_of_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_sources(tmp_path, monkeypatch, "blobs")

    with pytest.raises(UserError, match="unknown source 'blob'; did you mean 'blobs'"):
        check_source(SourceConfig(name="blob"))


def test_broken_source_raises_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_sources(tmp_path, monkeypatch, "missing")

    with pytest.raises(UserError, match=r"^data\.name: data source 'missing' of other_package 1\."):
        check_source(SourceConfig(name="missing"))


def test_source_that_returns_no_data_set_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_sources(tmp_path, monkeypatch, "wrong")

    with pytest.raises(UserError, match=r"^data\.name: wrong: expected .*Dataset, got int$"):
        load_source(SourceConfig(name="wrong"), tmp_path)


def test_logger_is_imported_when_it_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, LOGGERS, LOGGER)

    load_config({"output": {"loggers": ["csv"]}})
    assert "other_package" not in sys.modules

    load_config({"output": {"loggers": ["lines"]}})
    assert "other_package" in sys.modules
    assert "lines" in list(register_logger)


def test_run_uses_the_logger_of_a_plugin_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, LOGGERS, LOGGER)
    config = {
        "rounds": 2,
        "data": {"name": "digits", "train_limit": 100},
        "clients": {"count": 2, "defaults": {"model": "mlp"}},
        "algorithm": {"name": "local"},
        "output": {
            "plots": False,
            "report": False,
            "loggers": [{"kind": "lines", "start_at": 10}],
        },
    }

    finished = run(config, out=tmp_path / "run")

    assert (finished.path / "lines.txt").read_text() == "11 12 "


@pytest.mark.parametrize(
    ("code", "entry", "message"),
    [
        (LOGGER, "line", "output.loggers.0.kind: unknown logger 'line'; did you mean 'lines'?"),
        (LOGGER, {"kind": "lines", "start_att": 1},
         "output.loggers.0.start_att: unknown key; did you mean 'start_at'? (kind=lines)"),
        ("1 / 0", "lines", "output.loggers.0.kind: logger 'lines' of other_package 1.0 cannot be "
         "loaded: ZeroDivisionError: division by zero"),
        ("class Lines: pass", "lines", "output.loggers.0.kind: logger 'lines' of other_package 1.0 "
         "is not valid: expected a subclass of hetero_fl.reporting.loggers.base.Logger"),
    ],
)  # fmt: skip
def test_mistakes_with_the_logger_of_a_plugin_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, entry: object, message: str
) -> None:
    install(tmp_path, monkeypatch, LOGGERS, code)

    with pytest.raises(UserError) as caught:
        load_config({"output": {"loggers": [entry]}})

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
