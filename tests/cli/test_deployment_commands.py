"""`federate`, `server` and `node`, with real processes: few, for each start takes seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.experiment import run
from hetero_fl.reporting.run import Run
from tests.support.federations import config
from tests.support.waiting_command import SIGN

ROOT = Path(__file__).parents[2]
SERIAL = {"runtime__executor": "serial"}
PATIENCE = 300.0  # seconds: this machine may be busy
PYTHON = ("-X", "faulthandler", "-W", "error", "-W", "ignore::DeprecationWarning")
# in place of the command: it waits after a round, to be ended
WAITING = "tests.support.waiting_command"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path, config(**SERIAL))


def written(folder: Path, source: dict[str, Any], name: str = "small.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(source))
    return folder / name


@pytest.fixture
def without_flower(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide Flower, and forget modules that were imported without it."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    def forget() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.startswith("hetero_fl.deployment.flower")]
        return {name: sys.modules.pop(name) for name in names}

    loaded = forget()
    monkeypatch.setattr("importlib.metadata.version", missing)
    yield
    forget()
    sys.modules.update(loaded)


def test_missing_flower_names_the_extra(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_flower: None
) -> None:
    command = ["flower-app", str(tmp_path / "app"), "--config", str(file)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "pip install 'hetero_fl[flower]'" in error and error.count("\n") == 1
    assert not (tmp_path / "app").exists()


@contextmanager
def started(
    *arguments: str | Path, cwd: Path, log: Path, module: str = "hetero_fl.cli"
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a new process group, which is killed at the end."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(cwd),
        "OMP_NUM_THREADS": "1",
    }
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, *PYTHON, "-m", module, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(what: Callable[[], object], *logs: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "\n".join(log.read_text() for log in logs)
        time.sleep(0.1)


def ended(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the exit status; if the process hangs, its stack traces are in the log."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        process.wait()
        raise AssertionError(log.read_text()) from None


def relatives(folder: Path) -> list[str]:
    """Return command lines of processes that use this folder for temporary files."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0" in (path / "environ").read_text(errors="replace"):
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


def same(a: Run, b: Run) -> None:
    for key in (
        "personal",
        "global",
        "server",
        "clients",
        "communication",
        "rounds_completed",
        "data",
    ):
        assert a.summary[key] == b.summary[key], key
    files = sorted(path.name for path in (a.path / "models").glob("*.safetensors"))
    assert len(files) >= 2 and files == sorted(
        path.name for path in (b.path / "models").glob("*.safetensors")
    )
    for name in files:
        assert (a.path / "models" / name).read_bytes() == (b.path / "models" / name).read_bytes()


needs_processes = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="looks for processes in /proc"
)


@pytest.mark.slow
def test_federate_runs_code_with_permission(tmp_path: Path) -> None:
    code = "from hetero_fl.algorithms import FedAvg\n\nclass Mine(FedAvg):\n    pass\n"
    (tmp_path / "own_method_of_nodes.py").write_text(code)
    name, log = "python:own_method_of_nodes:Mine", tmp_path / "log.txt"
    written(tmp_path, config(name, "linear", 2, rounds=1, **SERIAL))
    command = ["federate", "--config", "small.yaml", "--out", "out"]

    # Without the flag, the command refuses the code; see tests/utils/test_code_permission.py.
    with started(*command, "--allow-code", cwd=tmp_path, log=log) as process:
        assert ended(process, log) == 0, log.read_text()

    run_of_nodes = Run(tmp_path / "out")
    assert run_of_nodes.summary["algorithm"] == name
    assert set(run_of_nodes.models) == {"server", "site_1", "site_2"}


@pytest.mark.slow
@needs_processes
def test_interrupted_federate_equals_simulation_and_cleans_up(tmp_path: Path) -> None:
    """Kill a node, interrupt the run, resume it to the same bits, then kill the command."""
    source = config("hybrid", rounds=2, clients=2, **SERIAL)
    written(tmp_path, source)
    log, waits = tmp_path / "log", {"cwd": tmp_path, "log": tmp_path / "log", "module": WAITING}
    with started("federate", "--config", "small.yaml", "--out", "out", **waits) as process:
        until(lambda: (tmp_path / SIGN).exists() or process.poll() is not None, log)
        os.killpg(process.pid, signal.SIGINT)
        assert ended(process, log) == 130, log.read_text()
    assert (
        "interrupted; to resume:" in log.read_text()
        and "federate --resume --out out" in log.read_text()
    )
    until(lambda: not relatives(tmp_path), log)
    assert not list(tmp_path.glob("hetero_fl-*")), "scratch folders are taken away"
    assert sorted(path.name for path in (tmp_path / "out" / "sites").iterdir()) == [
        "site_1",
        "site_2",
    ]
    with started("federate", "--resume", "--out", "out", cwd=tmp_path, log=log) as process:
        assert ended(process, log) == 0, log.read_text()
    assert log.read_text().splitlines()[-1] == "out"
    same(Run(tmp_path / "out"), run(source, out=tmp_path / "simulation"))
    with started("federate", "--config", "small.yaml", "--out", "killed", **waits) as process:
        until(lambda: len(relatives(tmp_path)) >= 5 or process.poll() is not None, log)
        assert process.poll() is None, log.read_text()
        process.kill()
    until(lambda: not relatives(tmp_path), log)
