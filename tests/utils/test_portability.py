"""Functions that Windows or macOS lacks have a fallback, or their absence gives one line."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from hetero_fl.cli import _is_closed, main
from hetero_fl.deployment.flower.app import check_flower
from hetero_fl.deployment.flower.worker import WorkerError, socket_path
from hetero_fl.utils import environment, processes
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import write_atomically
from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
# Modules of the standard library that Windows lacks.
POSIX_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")


def test_cores_are_counted_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_one_core", False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    assert environment.available_cores() == 6


def test_processor_is_described_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "builtins.open",
        Mock(side_effect=FileNotFoundError(errno.ENOENT, "no such file", "/proc/cpuinfo")),
    )

    assert environment.processor_name()


def test_files_are_written_without_open_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)

    write_atomically(tmp_path / "file", b"a\nb")

    assert (tmp_path / "file").read_bytes() == b"a\nb"


def test_interrupts_are_ignored_without_signal_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "pthread_sigmask", raising=False)

    with pytest.raises(KeyboardInterrupt), processes.ignore_interrupts_in_children():
        signal.raise_signal(signal.SIGINT)


@each_case("platform", ["darwin", "win32"])
def test_workers_are_spawned_on_other_systems(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    assert processes.worker_context().get_start_method() == "spawn"


def test_pipes_count_as_open_without_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll", raising=False)

    assert not _is_closed(sys.stdout)


def test_windows_sends_no_signal_to_find_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(
        os, "kill", Mock(side_effect=AssertionError("os.kill interrupts a process on Windows"))
    )

    assert not processes.is_process_running(os.getpid())


def test_deployment_without_fork_or_unix_sockets_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "fork", raising=False)
    monkeypatch.delattr(os, "getuid", raising=False)

    with pytest.raises(
        UserError, match=r"^deployments need fork and Unix sockets, which .* Linux$"
    ):
        check_flower()
    with pytest.raises(WorkerError, match="need Unix sockets"):
        socket_path(Path("site.yaml"))


def test_output_replaces_characters_that_cannot_be_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))

    assert main(["methods", "fedprox"]) == 0

    sys.stdout.flush()
    assert b"fedprox" in output.getvalue()


@pytest.mark.slow
def test_modules_are_imported_without_posix_modules() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "hetero_fl").rglob("*.py"))
        # Ray itself needs these modules, and Flower's processes do not run on Windows.
        if path.name not in ("__main__.py", "ray.py") and "flower" not in path.parts
    ]
    code = (
        "import sys, importlib\n"
        # Packages such as torch decide by the platform, so they are imported first.
        "import torch, pandas, matplotlib, filelock, rich.console, multiprocessing.managers\n"
        f"sys.modules.update(dict.fromkeys({POSIX_MODULES!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
