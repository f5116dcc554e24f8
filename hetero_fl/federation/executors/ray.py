"""Workers as actors on a Ray cluster: as many machines as there are, with the federation placed once and read where it lies."""

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.util.serialization import deregister_serializer, register_serializer

from hetero_fl.federation.executors.workers import JobResult, Worker, WorkerJob, WorkerSetup
from hetero_fl.utils.errors import RunFailedError, UserError

PATIENCE = 600.0  # seconds in which a cluster has to make room for a worker
ANSWER = 10.0  # seconds in which a cluster's head has to answer
LOOK = 10.0  # seconds between two looks whether it has


class RayActorPool:
    """A crew of Ray actors. One that is lost (its process, its node) is replaced wherever there is room."""

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size = size
        self._threads = setup.threads
        self._gpu = setup.devices[0].startswith("cuda")
        self._stack = ExitStack()
        self._stack.enter_context(connect(None, size * setup.threads))
        self._setup = _store_setup(setup)
        self._tasks: dict[Any, int] = {}  # running jobs, by their future
        self._crew = [self._start(i, setup.threads) for i in range(size)]

    def send(self, worker: int, job: WorkerJob) -> None:
        self._tasks[self._crew[worker][0].run_job.remote(job)] = worker

    def receive(self) -> tuple[int, JobResult | None]:
        while not (ended := ray.wait(list(self._tasks), timeout=LOOK)[0]):
            self._check_room()
        worker = self._tasks.pop(ended[0])
        try:
            return worker, ray.get(ended[0])
        except (
            ray.exceptions.RayTaskError
        ) as error:  # what a job raises is in its results: this is not of its doing
            raise RunFailedError(f"a worker failed: {_line(error.cause)}") from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RunFailedError(f"a worker cannot start: {_line(error)}") from error
            ray.kill(self._crew[worker][0])
            # no CPU of its own: it has to fit on what is left
            self._crew[worker] = self._start(worker, 0)
            return worker, None

    def close(self) -> None:
        for actor, _, _ in self._crew:
            ray.kill(actor)
        self._crew.clear()
        self._stack.close()

    def _start(self, index: int, cpus: int) -> tuple[Any, Any, float]:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / self.size) if self._gpu else 0.0
        kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(RayActor)
        actor = kind.remote(self._setup, index)
        return actor, actor.is_ready.remote(), time.monotonic()

    def _check_room(self) -> None:
        for worker in self._tasks.values():
            _, ready, since = self._crew[worker]
            if time.monotonic() - since > PATIENCE and not ray.wait([ready], timeout=0)[0]:
                needs = f"{self._threads} CPUs" + (" and a GPU" if self._gpu else "")
                raise RunFailedError(
                    f"the cluster has had no room for worker {worker} ({needs}) for {PATIENCE:.0f} s"
                )


class RayActor:
    """A worker in an actor's process. On a GPU it sees only its own."""

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        self._worker = Worker(setup, index)

    def is_ready(self) -> bool:
        """Whether it is there."""
        return True

    def run_job(self, job: WorkerJob) -> JobResult:
        """See `Worker.run_job`."""
        return self._worker.run_job(job).with_checksums()


@contextmanager
def connect(address: str | None, cpus: int) -> Iterator[None]:
    """Use the cluster at `address`, by default the one that RAY_ADDRESS names, else one of our own on this machine with so
    many CPUs, which is gone afterwards. A connection that is there already is used, and left.

    Raises UserError if nothing answers there.
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
            raise UserError(f"runtime.address: found '{address}': {_line(error)}") from None
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not (host and colon and port.isdigit()) or "/" in host:
        raise UserError(
            f"runtime.address: found '{address}'; write host:port of the cluster's head, or auto"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"runtime.address: found '{address}', where nothing answers ({error})"
        ) from None


def cluster_cpus() -> int:
    """Those of the cluster that is connected."""
    return int(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Ray takes SIGTERM for itself."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _store_setup(setup: WorkerSetup) -> Any:
    """A reference to the setup in the object store. Tensors lie there as arrays, which the actors of a node read in place."""
    register_serializer(torch.Tensor, serializer=_array, deserializer=_tensor)
    try:
        return ray.put(setup)
    finally:
        deregister_serializer(torch.Tensor)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():  # that it cannot be written to is meant: raw data never is
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _line(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
