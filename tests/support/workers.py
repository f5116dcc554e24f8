"""Worker pools for tests, complete results of runs, and processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.processes import ProcessPool
from hetero_fl.federation.executors.workers import (
    Cohort,
    JobResult,
    PooledExecutor,
    Worker,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
)
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.serialization import encode
from tests.support.federations import MIXED, config

METHODS = ["hybrid", "fedavg", "fd", "ensemble"]
ROOT = Path(__file__).parents[2]
# Seconds to wait for an event, because the machine may be busy.
PATIENCE = 300.0


def source(method: str, **changes: Any) -> dict[str, Any]:
    """Return a run of four clients of three architectures, three of them per round."""
    return config(
        method,
        MIXED,
        clients=4,
        rounds=3,
        clients__per_round=3,
        server={"model": "linear"},
        **changes,
    )


def setup_of(method: str | dict[str, Any]) -> WorkerSetup:
    """Return the worker setup of a run."""
    prepared = prepare(source(method) if isinstance(method, str) else method)
    return WorkerSetup(prepared.method, prepared.federation, 1, ("cpu",))


def rounds_on(
    setup: WorkerSetup, pool: WorkerPool | None, size: int = 1, cohort: int = 3
) -> FederatedTrainer:
    """Return a new run on the first `size` workers of a pool, or in this process without one."""
    executor: Executor
    if pool is None:
        executor = InProcessExecutor(Worker(setup, 0).runtime)
    else:
        pool.size = size
        backend = make_backend(DeviceMemory(torch.device("cpu")))
        executor = PooledExecutor(pool, setup.federation.client_infos, StateStore(), backend)
    return FederatedTrainer(setup.algorithm, setup.federation, executor, cohort)


def outcome(rounds: FederatedTrainer, num_rounds: int = 3) -> dict[str, Any]:
    """Return all results of rounds and evaluation: models, private state, scores, traffic."""
    records = [rounds.run_round() for _ in range(num_rounds)]
    read = rounds.evaluate(details=True)
    return {
        "records": [{k: v for k, v in record.items() if k != "seconds"} for record in records],
        "run": encode(rounds.state_dict(), "run"),
        "private": {
            client: rounds.store.encoded(client) for client in rounds.federation.client_infos
        },
        "readings": read,
    }


def models(out: Path) -> dict[str, bytes]:
    """Return the bytes of the saved models of a run."""
    files = sorted((out / "models").rglob("*.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def figures(out: Path) -> list[dict[str, Any]]:
    """Return the records of a run without measured seconds."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


class LocalWorkerPool(WorkerPool):
    """Workers in this process, which run jobs in turn."""

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        super().__init__(size)
        self.jobs: list[WorkerJob] = []
        self._workers = [Worker(setup, i) for i in range(size)]

    def submit(self, position: int, job: WorkerJob, cohort: Cohort) -> None:
        cohort.outcomes.put((position, self.exchange(len(self.jobs) % self.size, job)))
        self.jobs.append(job)

    def exchange(self, worker: int, job: WorkerJob) -> JobResult:
        return self._workers[worker].run_job(job)

    def replace_worker(self, worker: int) -> None:
        """Do nothing: there are no processes."""

    def stop_workers(self) -> None:
        """Do nothing: there are no processes."""


class SharedProcessPool(ProcessPool):
    """Processes that are replaced for each of several runs."""

    def take(self, setup: WorkerSetup) -> None:
        """Start the workers of another run."""
        self.close()
        super().__init__(setup, len(self._workers))


def running_processes() -> Iterator[tuple[int, list[bytes], dict[bytes, bytes]]]:
    """Yield the number, the command and the environment variables of processes."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            pairs = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        yield int(entry.name), command, dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)


def session_processes(session: int) -> list[int]:
    """Return the running processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def eventually(what: Callable[[], object], pause: float = 0.02) -> bool:
    """Wait until a condition holds; return whether it did within `PATIENCE` seconds."""
    ends = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(pause)
    return True


def session_ends(session: int) -> bool:
    """Wait until all processes of a session have ended; return whether they did."""
    return eventually(lambda: not session_processes(session), 0.1)


def environment() -> dict[str, str]:
    """Return environment variables for commands in separate processes."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start_session(
    command: list[str],
    cwd: Path,
    env: Mapping[str, str],
    stdout: int | None = None,
) -> subprocess.Popen[str]:
    """Start a command in a new session in which SIGINT interrupts, also if it is ignored here."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The function takes no lock, and there is no argument of Popen for signal handlers.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


@contextlib.contextmanager
def shared_process_pool(setup: WorkerSetup, size: int) -> Iterator[SharedProcessPool]:
    """Return so many processes for several runs."""
    pool = SharedProcessPool(setup, size)
    yield pool
    pool.close()
