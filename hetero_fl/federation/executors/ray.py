"""Workers as actors on a Ray cluster.

The federation is put into the object store once; the actors of a node read it in place.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.util.serialization import deregister_serializer, register_serializer

from hetero_fl.federation.executors.workers import JobResult, Worker, WorkerJob, WorkerSetup
from hetero_fl.utils.errors import RunFailedError, UserError

START_TIMEOUT = 600.0  # seconds in which a cluster has to make room for a worker
CHECK_INTERVAL = 10.0  # seconds between two checks whether it has
CONNECT_TIMEOUT = 10.0  # seconds in which a cluster's head has to answer


class RayActorPool:
    """Ray actors. One that is lost, with its process or node, is replaced wherever there is room."""

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size = size
        self._threads = setup.threads
        self._gpu = setup.devices[0].startswith("cuda")
        self._stack = ExitStack()
        self._stack.enter_context(connect(None, size * setup.threads))
        self._setup = _store_setup(setup)
        # By worker, in order. Only the first is waited for: a later, smaller result may arrive sooner.
        self._tasks: list[deque[Any]] = [deque() for _ in range(size)]
        self._workers = [self._start(i, setup.threads) for i in range(size)]

    def send(self, worker: int, job: WorkerJob) -> None:
        self._tasks[worker].append(self._workers[worker][0].run_job.remote(job))

    def receive(self) -> tuple[int, JobResult | None]:
        first = {tasks[0]: worker for worker, tasks in enumerate(self._tasks) if tasks}
        while not (ended := ray.wait(list(first), timeout=CHECK_INTERVAL)[0]):
            self._check_room()
        worker = first[ended[0]]
        self._tasks[worker].popleft()
        try:
            return worker, ray.get(ended[0])
        except ray.exceptions.RayTaskError as error:
            # What a job raises is in its result; this was raised around it.
            raise RunFailedError(f"a worker failed: {_describe(error.cause)}") from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RunFailedError(f"a worker cannot start: {_describe(error)}") from error
            ray.kill(self._workers[worker][0])
            self._tasks[worker].clear()
            # Without a CPU of its own, because it has to fit on what is left.
            self._workers[worker] = self._start(worker, 0)
            return worker, None

    def close(self) -> None:
        for actor, _, _ in self._workers:
            ray.kill(actor)
        self._workers.clear()
        self._stack.close()

    def _start(self, index: int, cpus: int) -> tuple[Any, Any, float]:
        """Return a new actor, a future that is ready when it has started, and the time."""
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / self.size) if self._gpu else 0.0
        kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(RayActor)
        actor = kind.remote(self._setup, index)
        return actor, actor.is_ready.remote(), time.monotonic()

    def _check_room(self) -> None:
        """Raise RunFailedError if an actor has not found a place for too long."""
        for worker, (_, ready, since) in enumerate(self._workers):
            if not self._tasks[worker]:
                continue
            if time.monotonic() - since > START_TIMEOUT and not ray.wait([ready], timeout=0)[0]:
                needs = f"{self._threads} CPUs" + (" and a GPU" if self._gpu else "")
                raise RunFailedError(
                    f"the cluster has had no room for worker {worker} ({needs}) for {START_TIMEOUT:.0f} s"
                )


class RayActor:
    """A worker in an actor's process, which sees only the GPU that is assigned to it."""

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        self._worker = Worker(setup, index)

    def is_ready(self) -> bool:
        """Return as soon as the actor has started."""
        return True

    def run_job(self, job: WorkerJob) -> JobResult:
        """Run a job as `Worker.run_job` does."""
        return self._worker.run_job(job).with_checksums()


@contextmanager
def connect(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to a Ray cluster. An existing connection is used and stays open.

    Args:
        address: The cluster's address; by default the one in RAY_ADDRESS, else a cluster is started
            on this machine and removed afterwards.
        cpus: CPUs of a cluster that is started.

    Raises:
        UserError: If no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = tempfile.mkdtemp(prefix="hetero_fl-") if address == "local" else None
    own: dict[str, Any] = (
        {"num_cpus": cpus, "include_dashboard": False, "_temp_dir": folder} if folder else {}
    )
    try:
        try:
            with _keep_signal_handlers():
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"runtime.address: found '{address}': {_describe(error)}") from None
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Raise UserError if nothing answers at the address: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not (host and colon and port.isdigit()) or "/" in host:
        raise UserError(
            f"runtime.address: found '{address}'; write host:port of the cluster's head, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"runtime.address: found '{address}', where nothing answers ({error})"
        ) from None


def cluster_cpus() -> int:
    """Return the number of CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _store_setup(setup: WorkerSetup) -> Any:
    """Put the setup into the object store, with tensors as arrays, and return a reference."""
    register_serializer(torch.Tensor, serializer=torch.Tensor.numpy, deserializer=_to_tensor)
    try:
        return ray.put(setup)
    finally:
        deregister_serializer(torch.Tensor)


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # The array is read-only, on purpose: raw data is never written to.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _describe(error: BaseException) -> str:
    """Return an error's class and the last line of its message."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
