"""Workers as actors on a Ray cluster.

The setup of the workers, including the data, is put into the object store once. The actors of a
node read the data from the object store without a copy.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray
import torch
from ray.util.serialization import deregister_serializer, register_serializer
from typing_extensions import override

from hetero_fl.federation.executors.workers import (
    JobResult,
    Worker,
    WorkerDiedError,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
)
from hetero_fl.utils.errors import RunFailedError, UserError

# Maximum time in seconds until a cluster has started all workers.
START_TIMEOUT = 600.0
# Maximum time in seconds until the head of a cluster answers.
CONNECT_TIMEOUT = 10.0


class RayActorPool(WorkerPool):
    """Pool of Ray actors. Actors whose process or node is lost are replaced.

    Args:
        setup: Setup of the workers.
        size: Number of workers.

    Raises:
        RunFailedError: If the cluster does not start all workers within the time limit.
    """

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        super().__init__(size)
        self._threads_per_worker = setup.threads
        self._gpu = setup.devices[0].startswith("cuda")
        self._stack = ExitStack()
        self._stack.enter_context(connect(None, size * setup.threads))
        self._setup = _store_setup(setup)
        self._actors: dict[int, Any] = {}
        self._start(range(size), setup.threads)

    @override
    def exchange(self, worker: int, job: WorkerJob) -> JobResult:
        try:
            result: JobResult = ray.get(self._actors[worker].run_job.remote(job))
        except ray.exceptions.RayTaskError as error:
            # Exceptions of jobs are part of their results; this one was raised outside of a job.
            raise RunFailedError(f"a worker failed: {_describe(error.cause)}") from error
        except ray.exceptions.RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise RunFailedError(f"a worker cannot start: {_describe(error)}") from error
            raise WorkerDiedError from error
        return result

    @override
    def replace_worker(self, worker: int) -> None:
        ray.kill(self._actors[worker])
        # Reserve no CPU, because the remaining nodes may have none left.
        self._start([worker], 0)

    @override
    def stop_workers(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    @override
    def close(self) -> None:
        super().close()
        self._stack.close()

    def _start(self, workers: Collection[int], cpus: int) -> None:
        """Start an actor for each worker, and wait until the actors have started.

        Raises:
            RunFailedError: If the cluster has not started an actor within the time limit.
        """
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / self.size) if self._gpu else 0.0
        actor_class: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(
            Worker
        )
        started = {}
        for worker in workers:
            self._actors[worker] = actor_class.remote(self._setup, worker)
            started[self._actors[worker].__ray_ready__.remote()] = worker
        _, waiting = ray.wait(list(started), num_returns=len(started), timeout=START_TIMEOUT)
        if waiting:
            needs = f"{self._threads_per_worker} CPUs" + (" and a GPU" if self._gpu else "")
            raise RunFailedError(
                f"the cluster had no resources for worker {started[waiting[0]]} ({needs}) "
                f"within {START_TIMEOUT:.0f} s"
            )


@contextmanager
def connect(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to a Ray cluster within the context.

    If this process is already connected to a cluster, the connection is used and stays open.

    Args:
        address: Address of the cluster. If None, the address in the environment variable
            RAY_ADDRESS is used. If neither is set, a cluster is started on this machine and stopped
            at the end of the context.
        cpus: Number of CPUs of a cluster that is started on this machine.

    Raises:
        UserError: If the address is invalid or no cluster answers at the address.
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
            raise UserError(
                f"runtime.address: cannot connect to '{address}': {_describe(error)}"
            ) from None
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_address(address: str) -> None:
    """Check that an address can be reached, because Ray would try to connect for minutes.

    Raises:
        UserError: If the address is invalid or cannot be reached.
    """
    host, colon, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not (host and colon and port.isdigit()) or "/" in host:
        raise UserError(
            "runtime.address: expected host:port of the cluster's head, auto or local, "
            f"got '{address}'"
        )
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"runtime.address: cannot connect to '{address}': {error}") from None


def cluster_cpus() -> int:
    """Return the number of CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 0))


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Restore the handler of SIGTERM at the end of the context, because Ray sets another one."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _store_setup(setup: WorkerSetup) -> Any:
    """Put the setup into the object store, and return a reference to the stored object.

    Tensors are stored as NumPy arrays, which actors read without a copy.
    """
    register_serializer(torch.Tensor, serializer=torch.Tensor.numpy, deserializer=_to_tensor)
    try:
        return ray.put(setup)
    finally:
        deregister_serializer(torch.Tensor)


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # The array is read-only, which is intended: raw data is never modified.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _describe(error: BaseException) -> str:
    """Return the class name of an error and the last line of the message."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
