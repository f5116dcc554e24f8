"""Worker pools for tests, complete results of runs, and processes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.communication.protocol import Message
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import prepare
from hetero_fl.federation.executors import processes
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.processes import SharedMemoryConnection
from hetero_fl.federation.executors.workers import (
    JOBS_PER_WORKER,
    JobResult,
    Worker,
    WorkerExecutor,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
)
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.trainer import Trainer
from hetero_fl.utils.processes import exit_with_parent
from hetero_fl.utils.serialization import encode
from tests.support.federations import MIXED, broadcasts, config

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
) -> Trainer:
    """Return a new run on the first `size` workers of a pool, or in this process without one."""
    executor: Executor
    if pool is None:
        executor = InProcessExecutor(Worker(setup, 0).runtime)
    else:
        pool.size = size
        backend = make_backend(DeviceMemory(torch.device("cpu")))
        executor = WorkerExecutor(pool, setup.federation.client_infos, StateStore(), backend)
    return Trainer(setup.algorithm, setup.federation, executor, cohort)


def first_job(setup: WorkerSetup) -> WorkerJob:
    """Return a client's task of the first round."""
    (client, body), *_ = broadcasts(rounds_on(setup, None), ["site_1"]).items()
    return WorkerJob(0, "answer", [[client]], {client: Message("train", body)}, {})


def has_checksums(done: JobResult) -> bool:
    """Return whether every reply carries the checksum of its bytes."""
    replies = [reply for reply in done.replies.values() if isinstance(reply, Message)]
    return (
        done.error is None
        and bool(replies)
        and all(r.checksum is not None and r.is_intact for r in replies)
    )


def outcome(rounds: Trainer, num_rounds: int = 3) -> dict[str, Any]:
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


class LocalWorkerPool:
    """Workers in this process, whose results come in a known order.

    Results of the first worker come first, or those of the last one if `turned` is set.
    """

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size, self.turned = size, False
        self.workers = [Worker(setup, i) for i in range(size)]
        self.jobs: dict[int, list[WorkerJob]] = {}
        # Number of jobs that were sent to a busy worker.
        self.waited = 0

    def send(self, worker: int, job: WorkerJob) -> None:
        self.waited += worker in self.jobs
        self.jobs.setdefault(worker, []).append(job)
        assert len(self.jobs[worker]) <= JOBS_PER_WORKER

    def receive(self) -> tuple[int, JobResult | None]:
        worker = (max if self.turned else min)(self.jobs)
        result = self.workers[worker].run_job(self.jobs[worker].pop(0))
        if not self.jobs[worker]:
            del self.jobs[worker]
        return worker, result

    def close(self) -> None:
        """Do nothing: there are no processes."""


class SharedProcessPool(processes.ProcessPool):
    """Processes that are started once and reused by several runs."""

    def take(self, setup: WorkerSetup) -> None:
        """Make the workers use the setup of another run."""
        setup.federation.data.share_memory()
        for _, carrier in self._workers:
            carrier.send(bytes(ForkingPickler.dumps(setup)))
        for _, carrier in self._workers:
            assert carrier.receive() == "ready"


def run_reusable_worker(
    connection: Connection, setup: WorkerSetup, index: int, environ: object
) -> None:
    """Run a worker that accepts a new setup, sent as bytes."""
    exit_with_parent()
    worker, carrier = (
        Worker(setup, index),
        SharedMemoryConnection(connection, received_strings=processes.BROADCASTS),
    )
    with contextlib.suppress(EOFError, OSError):
        while True:
            got = carrier.receive()
            if isinstance(got, bytes):
                worker = Worker(pickle.loads(got), index)
                carrier.send("ready")
            else:
                carrier.send(worker.run_job(got))


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
    """Start that many processes once for many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "run_worker", run_reusable_worker)
        pool = SharedProcessPool(setup, size)
    yield pool
    pool.size = size
    pool.close()
