"""Code named by a configuration is imported and run only with permission."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

import hetero_fl
from hetero_fl.cli import main
from hetero_fl.deployment.config import SiteConfig, load_site_config
from hetero_fl.deployment.messages import RequestRefusedError
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.sites import Sites, SitesState
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.methods import describe_methods, method_class
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.cases import each_case
from tests.support.federations import changed, config
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import EventLines

TRAP = """
import pathlib
from torch import nn
from hetero_fl.robustness.rules import PredictionRule, Rule
from hetero_fl.algorithms import FedAvg
from hetero_fl.robustness.attacks import Attack
from hetero_fl.data import from_arrays
from hetero_fl.core.objectives import Supervised

pathlib.Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self, num_classes, in_channels, input_size, width=4):
        super().__init__()
        height, columns = input_size
        layer = nn.Linear(in_channels * height * columns, width)
        self.backbone = nn.Sequential(nn.Flatten(), layer)
        self.head = nn.Linear(width, num_classes)


class Method(FedAvg):
    pass


class Loss(Supervised):
    pass


class Middle(Rule):
    pass


class Voice(PredictionRule):
    pass


class Lie(Attack):
    pass


def rows(config, root):
    return from_arrays([[0.0, 1.0]] * 40, [0, 1] * 20)


def deal(context):
    clients = len(context.clients)
    return [range(k, context.num_rows, clients) for k in range(clients)]
"""
BARE: dict[str, Any] = {"runtime__executor": "serial"}
LINE = "'{name}' names code; pass --allow-code to run it"
PLACES: dict[str, tuple[dict[str, Any], str, str]] = {
    "defaults": ({"clients__defaults__model": "{}Net"}, "clients.defaults.model", "Net"),
    "group": (
        {"clients__groups": [{"name": "a", "model": {"name": "{}Net", "width": 3}}]},
        "clients.groups.0.model.name",
        "Net",
    ),
    "list": ({"clients__defaults__model": ["mlp", "{}Net"]}, "clients.defaults.model.1", "Net"),
    "client": (
        {"clients__overrides": [{"match": "site_2", "model": "{}Net"}]},
        "clients.overrides.0.model",
        "Net",
    ),
    "student": ({"server__model": "{}Net"}, "server.model", "Net"),
    "objective": ({"clients__defaults__objective": "{}Loss"}, "clients.defaults.objective", "Loss"),
    "objective of one": (
        {"clients__overrides": [{"match": "*", "objective": "{}Loss"}]},
        "clients.overrides.0.objective",
        "Loss",
    ),
    "method": ({"algorithm": {"name": "{}Method"}}, "algorithm.name", "Method"),
    "setting": ({"algorithm": {"name": "fml", "mentee": "{}Net"}}, "algorithm.mentee", "Net"),
    "source": ({"data__name": "{}rows"}, "data.name", "rows"),
    "public": ({"data__proxy__source": {"name": "{}rows"}}, "data.proxy.source.name", "rows"),
    "own data": (
        {"clients__groups": [{"name": "a", "data": {"name": "{}rows"}}, {"name": "b"}]},
        "clients.groups.0.data.name",
        "rows",
    ),
    "partition": ({"data__partition__kind": "{}deal"}, "data.partition.kind", "deal"),
    "rule": ({"aggregation": {"rule": "{}Middle"}}, "aggregation.rule", "Middle"),
    "predictions": (
        {"aggregation": {"predictions": "{}Voice"}},
        "aggregation.predictions",
        "Voice",
    ),
    "attack": ({"attacks": {"name": "{}Lie"}}, "attacks.name", "Lie"),
}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create a module that writes a file when imported; return the prefix of references to it."""
    name = f"trap_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield f"python:{name}:"
    sys.modules.pop(name, None)


def filled(value: dict[str, Any], trap: str) -> Any:
    """Return the settings with the trap in place of `{}`."""
    return json.loads(json.dumps(value).replace("{}", trap))


def written(source: dict[str, Any], name: str = "small.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(source))
    return name


def refused_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error line of a refused command, which must have run and written nothing.

    The module of the trap would have written a file.
    """
    before = {path.name for path in Path().iterdir()}
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    )
    assert {path.name for path in Path().iterdir()} == before
    return captured.err.removeprefix("error: ").strip()


def test_commands_refuse_code_named_by_files(
    trap: str, capsys: pytest.CaptureFixture[str], subtests: pytest.Subtests
) -> None:
    for place, (changes, key, name) in PLACES.items():
        file = written(changed(config(**BARE), **filled(changes, trap)), f"{place}.yaml")
        line = f"{file}: {key}: {LINE.format(name=trap + name)}"
        with subtests.test(place=place):
            assert refused_line(["train", "--config", file, "--out", "run"], capsys) == line
            compare = ["compare", "--config", file, "--algorithms", "local", "--out", "all"]
            if not key.startswith("algorithm"):
                assert refused_line(compare, capsys) == line
            assert main(["train", "--config", file, "--check"]) == 0
            printed = capsys.readouterr().out
            assert "unknown" in printed and f"note: {key} names code, {trap + name};" in printed
            with pytest.raises(UserError, match="pass allow_code=True to run it"):
                load_config(file)
    assert not Path("imported").exists()

    for place in PLACES:
        load_config(f"{place}.yaml", allow_code=True)


def test_federations_refuse_code_that_a_file_names(
    trap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flwr")
    file = written(config(models=f"{trap}Net", **BARE))
    for command in (["federate", "--out", "run"], ["flower-app", "app"]):
        line = refused_line([*command, "--config", file], capsys)
        assert line == f"{file}: clients.groups.0.model: {LINE.format(name=trap + 'Net')}"


def test_name_of_another_type_is_refused(trap: str, capsys: pytest.CaptureFixture[str]) -> None:
    binary = {"name": f"{trap}Net".encode()}
    for changes, words in (
        ({"clients__defaults__model": binary}, LINE.format(name=f"{trap}Net")),
        ({"algorithm": {"name": "fml", "mentee": binary}}, "algorithm.mentee.name: 'python:"),
    ):
        file = written(config(**BARE, **changes))
        assert "!!binary" in Path(file).read_text()
        assert words in refused_line(["train", "--config", file, "--out", "run"], capsys)


def test_command_line_names_require_the_flag(
    trap: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, method, rows = written(config("local", **BARE)), f"{trap}Method", f"{trap}rows"
    study = written({"config": file, "algorithms": [method], "out": "all"}, "study.yaml")
    override = f"algorithm.name={method}"
    run = str(finished)
    for name, place, command in (
        (method, f"{override}: algorithm.name: ", ["train", "-c", file, "--out", "run", override]),
        (method, "", ["compare", "-c", file, "--algorithms", f"local,{method}", "--out", "all"]),
        (method, "", ["compare", "--study", study]),
        (method, "", ["methods", method]),
        (rows, "--data: ", ["evaluate", run, "--data", rows]),
        (rows, "--data: ", ["join", run, "--data", rows]),
        (f"{trap}Net", "--model: ", ["join", run, "--data", "digits", "--model", f"{trap}Net"]),
    ):
        line = refused_line(command, capsys)
        assert line.startswith(place) and LINE.format(name=name) in line


def test_error_search_imports_no_code(trap: str) -> None:
    overrides = [
        "algorithm.align=true",
        "algorithm.proxy_rows=1",
        f"algorithm.name={trap}Method",
        "algorithm.name=ds_fl",
    ]
    Path("plain.yaml").write_text(yaml.safe_dump(config("fedavg", "mlp", 2)))

    with pytest.raises(UserError):
        load_config("plain.yaml", overrides, allow_code=frozenset())

    assert not Path("imported").exists()


def test_flag_permits_code(trap: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(config(f"{trap}Method", f"{trap}Net", rounds=1, **BARE))
    assert main(["train", "--config", file, "--check", "--allow-code"]) == 0
    assert "unknown" not in capsys.readouterr().out
    assert main(["train", "--config", file, "--out", "run", "--allow-code"]) == 0
    capsys.readouterr()

    assert LINE.format(name=f"{trap}Net") in refused_line(
        ["train", "--resume", "--out", "run"], capsys
    )
    assert main(["train", "--resume", "--out", "run", "--allow-code"]) == 0


@pytest.mark.slow
def test_comparison_processes_inherit_the_permission(
    trap: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    file = written(config("local", f"{trap}Net", 2, rounds=1, **BARE))
    compare = ["compare", "--config", file, "--algorithms", f"local,{trap}Method"]
    assert main([*compare, "--out", "all", "--allow-code"]) == 0
    assert "Method" in capsys.readouterr().out
    with pytest.raises(UserError, match="names code; pass allow_code=True"):
        hetero_fl.compare(file, ["local"], out="other")

    # A program may name a method.
    file = written(config("local", "mlp", 2, rounds=1, **BARE))
    assert (hetero_fl.compare(file, [f"{trap}Method"], out="own").path / "comparison.csv").exists()


OTHERS = [
    "python:os:system",
    "python:builtins:exec",
    "python:subprocess:Popen",
    "python:os.path:join",
]


@each_case(
    ("place", "name"),
    [
        *((place, OTHERS[0]) for place in PLACES if place not in ("predictions", "attack")),
        *(("source", name) for name in OTHERS[1:]),
        *(("defaults", name) for name in OTHERS[1:]),
    ],
)
def test_other_callables_are_refused_despite_the_flag(
    place: str,
    name: str,
    trap: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = Mock(side_effect=AssertionError("it was called"))

    monkeypatch.setattr("os.system", called)
    monkeypatch.setattr("subprocess.Popen.__init__", called)
    changes, _, what = PLACES[place]
    own = json.loads(json.dumps(changes).replace("{}" + what, name))
    file = written(changed(config("feddf" if place == "student" else "fedavg", **BARE), **own))
    line = refused_line(["train", "--config", file, "--out", "run", "--allow-code"], capsys)
    assert f"{name.split(':')[2]}" in line and "is not " in line


def test_functions_must_be_defined_in_the_named_module(
    trap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"{trap.split(':')[1]}.py").write_text(f"from shutil import copytree\n{TRAP}")
    file = written(config(**BARE))
    for key in ("data.name", "data.partition.kind"):
        assert (
            main(
                ["train", "--config", file, "--out", "run", "--allow-code", f"{key}={trap}copytree"]
            )
            == 2
        )
        line = capsys.readouterr().err
        assert (
            f"'{trap}copytree' is not defined in "
            f"'{trap.split(':')[1]}'; write python:shutil:copytree"
        ) in line
    assert not Path("run").exists()


def test_run_allows_code_named_by_the_program(trap: str) -> None:
    source = config("local", **BARE)
    file = written(source)
    load_config({**source, "algorithm": {"name": f"{trap}Method"}})
    load_config(file, [f"algorithm.name={trap}Method"])

    file = written({**source, "algorithm": {"name": f"{trap}Method"}})
    with pytest.raises(
        UserError,
        match=rf"algorithm\.name: '{trap}Method' names code; pass allow_code=True",
    ):
        hetero_fl.run(file, out="run")
    with pytest.raises(UserError, match="names code"):
        load_config(file, [f"clients.defaults.objective={trap}Loss"])
    assert load_config(file, allow_code=True).algorithm["name"] == f"{trap}Method"


def test_file_changed_during_compare_runs_no_code(
    trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(config("local", "mlp", 2, rounds=1, **BARE))
    later = config(
        "fml", "mlp", 2, rounds=1, **BARE, algorithm={"name": "fml", "mentee": f"{trap}Net"}
    )
    monkeypatch.setattr("hetero_fl.experiment.comparison.plan.read_config_file", lambda path: later)
    with pytest.raises(RunFailedError, match="names code"):
        hetero_fl.compare(file, ["fml"], out="all")
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("answer", "terminals"),
    [
        ("y\n", ("stdin", "stderr")),
        ("n\n", ("stdin", "stderr")),
        ("", ("stdin", "stderr")),
        ("y\n", ("stdin",)),
        ("y\n", ("stderr",)),
    ],
)
def test_terminal_user_is_asked(
    answer: str, terminals: tuple[str, ...], trap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(config("local", f"{trap}Net", 2, rounds=1, **BARE), "small\x1b[2K.yaml")
    streams = {"stdin": io.StringIO(answer * 5), "stderr": io.StringIO()}
    for name, stream in streams.items():
        monkeypatch.setattr(stream, "isatty", lambda name=name: name in terminals)
        monkeypatch.setattr(sys, name, stream)

    status = main(["train", "--config", file, "--out", "run"])

    question = (
        "small\\x1b[2K.yaml: clients.groups.0.model names code: "
        f"Net of module {trap.split(':')[1]}. Run it? [y/N] "
    )
    is_asked = len(terminals) == 2
    ran = is_asked and answer == "y\n"
    assert streams["stderr"].getvalue().count(question) == is_asked
    assert status == (0 if ran else 2)
    assert Path("imported").exists() is ran and Path("run").exists() is ran


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with two clients."""
    return hetero_fl.run(
        config("local", "mlp", 2, rounds=1, **BARE), out=tmp_path_factory.mktemp("run") / "run"
    ).path


def write_checksums() -> None:
    """Make the checksums of `run` those of its files."""
    directory = RunDirectory.open("run")
    directory.rewind_metrics(len(directory.lines()))
    directory.finish(directory.summary())


def crafted(run: Path, name: str, what: str) -> None:
    """Copy a run to `run` and make its config or models name code, with valid checksums."""
    shutil.copytree(run, "run")
    if what == "config":
        result = yaml.safe_load(Path("run/config.yaml").read_text())
        result["clients"]["groups"][0]["model"] = [{"name": name}]
        Path("run/config.yaml").write_text(yaml.safe_dump(result))
    else:
        for path in Path("run/models").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["hetero_fl"])
                tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
            about["architecture"]["name"] = name
            about["architecture"]["options"] = []
            save_file(tensors, path, {"hetero_fl": json.dumps(about)})
    write_checksums()


COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "evaluate": (["--data", "digits"], ("models",)),
    "join": (["--data", "digits", "--patients", "10", "--seeds", "0"], ("config", "models")),
    "audit": (["--shadows", "0", "--attack", "membership"], ("config", "models")),
    "export": (["--format", "safetensors"], ("models",)),
}


@pytest.mark.parametrize(
    ("command", "what"),
    [(command, what) for command, (_, whats) in COMMANDS.items() for what in whats],
)
def test_commands_refuse_code_that_a_run_directory_names(
    command: str, what: str, trap: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crafted(finished, f"{trap}Net", what)
    before = sorted(Path("run").rglob("*"))
    line = refused_line([command, "run", *COMMANDS[command][0]], capsys)
    file = (
        "run/config.yaml: clients.groups.0.model.0.name"
        if what == "config"
        else "run/models/site_1.safetensors: architecture.name"
    )
    assert line == f"{file}: {LINE.format(name=trap + 'Net')}"
    assert sorted(Path("run").rglob("*")) == before and not Path("imported").exists()
    if what == "config":
        assert "names code" in refused_line(["train", "--resume", "--out", "run"], capsys)
    function = getattr(hetero_fl, command)
    more = {"evaluate": ["digits"], "join": ["digits"]}.get(command, [])
    with pytest.raises(UserError, match="pass allow_code=True to run it"):
        function("run", *more, **({"out": "joined"} if command == "join" else {}))
    assert not Path("imported").exists()


def test_init_from_refuses_models_that_name_code(
    trap: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crafted(finished, f"{trap}Net", "models")
    file = written(config("local", "mlp", 2, init_from="run", **BARE))
    line = refused_line(["train", "--config", file, "--out", "next"], capsys)
    assert line.startswith("init_from: run/models/site_1.safetensors: architecture.name: 'python:")
    assert not Path("imported").exists()


def test_program_may_reuse_a_run_it_created(trap: str) -> None:
    run = hetero_fl.run(config("local", f"{trap}Net", 2, rounds=1, **BARE), out="run")
    assert run.predict("site_1", torch.zeros(2, 8, 8)).shape == (2, 10)
    assert hetero_fl.evaluate(run, "digits")["site_1"]["accuracy"] is not None
    with pytest.raises(UserError, match="pass allow_code=True"):
        _ = Run("run").models
    assert set(Run("run", allow_code=True).models) == {"site_1", "site_2"}


def test_model_of_a_client_requires_no_code_of_others(
    trap: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crafted(finished, f"{trap}Net", "models")
    shutil.copy(finished / "models" / "site_2.safetensors", "run/models")
    write_checksums()
    evaluate = ["evaluate", "run", "--data", "digits"]
    export = ["export", "run", "--format", "safetensors"]

    for command in (evaluate, export):
        line = refused_line([*command, "--client", "site_9"], capsys)
        assert line.startswith("--client: no model of 'site_9'; did you mean 'site_")
        assert "names code" in refused_line([*command, "--client", "site_1"], capsys)
        assert main([*command, "--client", "site_2"]) == 0 and capsys.readouterr().out
    assert not Path("imported").exists()


def test_report_imports_no_code(trap: str) -> None:
    assert method_class(f"{trap}Method") is None
    assert describe_methods([f"{trap}Method:lr=1"])[0][0] == "Method"
    assert method_class("python:os:system") is None and not Path("imported").exists()
    load_config({"algorithm": {"name": f"{trap}Method"}})
    assert method_class(f"{trap}Method") is not None


SITES: dict[str, dict[str, Any]] = {
    "model.0.name": {"model": "{}Net"},
    "data.name": {"data": {"name": "{}rows"}},
    "allows.own_code.0": {"allows": {"own_code": ["{}Method"]}},
    "allows.methods.0": {"allows": {"methods": ["{}Method"]}},
}


def test_site_file_does_not_grant_permission(trap: str, subtests: pytest.Subtests) -> None:
    for key, site in SITES.items():
        with subtests.test(key=key):
            file = written({"client": "site_1", **filled(site, trap)}, f"{key}.yaml")
            with pytest.raises(UserError) as caught:
                load_site_config(file)
            assert str(caught.value).startswith(f"{file}: {key}: '{trap}")
            assert str(caught.value).endswith("names code; pass allow_code=True to run it")
    assert not Path("imported").exists()
    for key in SITES:
        assert load_site_config(f"{key}.yaml", allow_code=True)[0].client == "site_1"


def test_node_runs_only_code_that_its_site_allows(trap: str) -> None:
    tree = {"config": config("local", f"{trap}Net", 2, **BARE), "public": "none"}
    refusing = SiteConfig(client="site_1")
    with pytest.raises(RequestRefusedError, match=r"is not in this site's allows\.own_code"):
        Node(refusing, Path("state"))._begin("run", tree)
    hidden = {**tree, "config": config("local", {"name": f"{trap}Net".encode()}, 2, **BARE)}
    with pytest.raises(RequestRefusedError, match="names code"):
        Node(refusing, Path("state"))._begin("run", hidden)
    assert not Path("imported").exists()
    allowing = SiteConfig.model_validate(
        {"client": "site_1", "allows": {"own_code": [f"{trap}Net"]}}
    )
    with pytest.raises(RequestRefusedError, match="public sets"):
        Node(allowing, Path("state"))._begin("run", tree)


def test_saved_node_settings_name_no_code(trap: str) -> None:
    settings = {"site_2": {"model": f"{trap}Net"}}
    known = SitesState(run="a", settings=settings, reports={})
    transport = LoopbackTransport()
    transport.join(Node(SiteConfig(client="site_1"), Path("state")).handle)
    sites = Sites(transport, ["site_1", "site_2"], EventLines())
    with pytest.raises(UserError, match=r"clients\.overrides\.0\.model: .* names code"):
        sites.join(load_config(config("local", "mlp", 2)), 1.0, known)
    assert not Path("imported").exists()
