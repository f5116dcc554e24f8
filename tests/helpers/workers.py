"""What the tests of every kind of worker have in common: everything that a run computes, and who is still there."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
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
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.utils.serialization import encode
from tests.helpers.small_federations import MIXED, broadcasts, config

METHODS = ["hybrid", "fedavg", "fd", "ensemble"]
ROOT = Path(__file__).parents[2]
PATIENCE = 300.0  # seconds for what has to happen: this machine may be busy


def source(method: str, **changes: Any) -> dict[str, Any]:
    """Four clients of three architectures, three of them in a round."""
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
    """What workers of such a run are given."""
    prepared = prepare(source(method) if isinstance(method, str) else method)
    return WorkerSetup(prepared.method, prepared.federation, 1, ("cpu",))


def rounds_on(
    setup: WorkerSetup, crew: WorkerPool | None, size: int = 1, cohort: int = 3
) -> SynchronousTrainer:
    """A run that begins, on the first `size` workers of a crew; without one in this process."""
    executor: Executor
    if crew is None:
        executor = InProcessExecutor(Worker(setup, 0).runtime)
    else:
        crew.size = size
        performer = make_backend(DeviceMemory(torch.device("cpu")))
        executor = WorkerExecutor(crew, setup.federation.client_infos, StateStore(), performer)
    return SynchronousTrainer(setup.algorithm, setup.federation, executor, cohort)


def first_job(setup: WorkerSetup) -> WorkerJob:
    """A client's task of the first round."""
    (client, body), *_ = broadcasts(rounds_on(setup, None), ["site_1"]).items()
    return WorkerJob(0, "answer", [[client]], {client: Message("train", body)}, {})


def left_sealed(done: JobResult) -> bool:
    """Whether every reply carries the checksum of its bytes."""
    replies = [reply for reply in done.replies.values() if isinstance(reply, Message)]
    return (
        done.error is None
        and bool(replies)
        and all(r.checksum is not None and r.is_intact for r in replies)
    )


def outcome(rounds: SynchronousTrainer, held: int = 3) -> dict[str, Any]:
    """Everything that rounds and readings compute: models, private state, scores, losses, traffic."""
    records = [rounds.run_round() for _ in range(held)]
    read = rounds.evaluate(details=True)
    return {
        "records": [{k: v for k, v in record.items() if k != "seconds"} for record in records],
        "run": encode(rounds.state_dict(), "run"),
        "private": {
            client: rounds.store.encoded(client) for client in rounds.federation.client_infos
        },
        "readings": read,
    }


class Here:
    """Workers in this process, whose results come in a known order.

    The first worker's come first, once `turned` is set the last one's.
    """

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size, self.turned = size, False
        self.workers = [Worker(setup, i) for i in range(size)]
        self.jobs: dict[int, list[WorkerJob]] = {}
        self.waited = 0  # jobs that were sent to a busy worker

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
        """Nothing to give back."""


class Lent(processes.ProcessPool):
    """Processes that are started once, and go from run to run."""

    def take(self, setup: WorkerSetup) -> None:
        """From now on they work for this run."""
        setup.federation.data.share_memory()
        for _, carrier in self._workers:
            carrier.send(bytes(ForkingPickler.dumps(setup)))
        for _, carrier in self._workers:
            assert carrier.receive() == "ready"


def work_in_turn(connection: Connection, setup: WorkerSetup, index: int, environ: object) -> None:
    """A worker's life, but that a new setup may come, as bytes."""
    threading.Thread(target=processes._exit_with_parent, daemon=True).start()
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


def members(session: int) -> list[int]:
    """Processes of a session that are still there."""
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


def comes(what: Callable[[], object], pause: float = 0.02) -> bool:
    """Whether it comes to be so, however slow the machine is."""
    ends = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(pause)
    return True


def gone(session: int) -> bool:
    """Whether all processes of a session end."""
    return comes(lambda: not members(session), 0.1)


def environment() -> dict[str, str]:
    """Of a command that is run in a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def lent(setup: WorkerSetup, size: int) -> Iterator[Lent]:
    """So many processes, started once for many tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "run_worker", work_in_turn)
        made = Lent(setup, size)
    yield made
    made.size = size
    made.close()
