"""Worker processes: imports of the fork server and environment of the workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.reporting.run_directory import is_locked
from hetero_fl.utils import processes

IMPORTS = """
import importlib, threading
import torch

def fail(*given, **named):
    raise AssertionError("an accelerator that is in use cannot be used by a forked process")

for name in ("is_available", "device_count", "init", "_lazy_init"):
    setattr(torch.cuda, name, fail)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name):
        setattr(torch._C, name, fail)
for name in {names}:
    importlib.import_module(name)
assert threading.active_count() == 1
"""


@pytest.mark.slow
def test_fork_server_imports_start_no_threads() -> None:
    modules = [
        "hetero_fl.federation.executors.processes",
        "hetero_fl.experiment.comparison.jobs",
        "hetero_fl.deployment.flower.worker",
    ]
    code = IMPORTS.format(names=[*processes.PRELOADED, *modules])
    subprocess.run([sys.executable, "-c", code], check=True)


def read_variable(name: str, connection: Any, environ: dict[str, str]) -> None:
    processes.begin_worker(environ)
    connection.send(os.environ.get(name))


def test_worker_gets_the_current_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    context = processes.worker_context()
    for value in ("first", "second"):
        monkeypatch.setenv("HETERO_FL_TEST", value)
        in_parent, in_worker = context.Pipe()
        given = ("HETERO_FL_TEST", in_worker, dict(os.environ))
        process = context.Process(target=read_variable, args=given)
        process.start()
        # Otherwise the test would wait forever for a worker that fails.
        in_worker.close()
        assert in_parent.recv() == value
        process.join()


ORPHANED = """
import hetero_fl
if __name__ == "__main__":
    source = {"data": {"name": "digits"}, "clients": {"count": 2}, "rounds": 100000}
    hetero_fl.compare(source, "local", out="out", jobs=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_comparison_worker_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "orphaned.py").write_text(ORPHANED)
    run = tmp_path / "out" / "runs" / "local-seed0"
    deadline = time.monotonic() + 300
    parent = subprocess.Popen([sys.executable, "orphaned.py"], cwd=tmp_path)
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_locked(run)

    parent.kill()

    parent.wait()
    while is_locked(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_locked(run)
