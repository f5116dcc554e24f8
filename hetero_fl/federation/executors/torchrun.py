"""Workers as torchrun ranks: rank 0 runs the command, and the other ranks run jobs.

Jobs are sent with the gloo backend of torch.distributed, because NCCL can send only tensors on a
GPU. Rank 0 waits for each other rank in a separate thread, so that the main thread still receives
Ctrl-C. When a rank dies, torchrun ends all ranks.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from typing_extensions import override

from hetero_fl.federation.executors.workers import (
    JobResult,
    Worker,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
    run_jobs,
)
from hetero_fl.utils.errors import RunFailedError

# Ranks wait for each other without a time limit, because torchrun detects ranks that have died.
NO_TIMEOUT = timedelta(days=20)
# Maximum time until all ranks are connected.
START_TIMEOUT = timedelta(minutes=10)
# Seconds to wait for the end of the other ranks.
EXIT_SECONDS = 10.0
# Object that is sent instead of a job at the end of the run.
END = None
# Threads of rank 0 that wait for results.
_listeners: list[threading.Thread] = []


def num_ranks() -> int:
    """Return the number of processes that torchrun has started, or 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_as_ranks(lead: Callable[[], int]) -> int:
    """Run a command in rank 0, and the jobs of the command in the other ranks.

    The other ranks run until the command has ended.

    Args:
        lead: Function that runs the command and returns the exit status.

    Returns:
        The exit status of this rank, which is 0 for all ranks except rank 0.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        # Rank 0 handles interrupts and ends the others.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store, rank, size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
    # The store may still have the stale addresses of an earlier attempt (torchrun --max-restarts).
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=NO_TIMEOUT)
    if rank > 0:
        _serve_rank_zero()
        return 0
    try:
        return lead()
    finally:
        # The command has ended, so signals are ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for other in range(1, size):
            # A rank that has already ended raises RuntimeError.
            with suppress(RuntimeError):
                dist.send_object_list([END], dst=other)
        for listener in _listeners:
            listener.join(EXIT_SECONDS)
        dist.destroy_process_group()


class TorchrunPool(WorkerPool):
    """Pool of the ranks that torchrun has started, in which worker i is rank i + 1.

    A command must create only one pool. If a rank ends, the run fails.

    Args:
        setup: Setup of the workers.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self.size = dist.get_world_size() - 1
        self._results: queue.SimpleQueue[tuple[int, JobResult | None]] = queue.SimpleQueue()
        for worker in range(self.size):
            dist.send_object_list([setup], dst=worker + 1)
            _listeners.append(threading.Thread(target=self._listen, args=(worker,), daemon=True))
            _listeners[-1].start()

    @override
    def send(self, worker: int, job: WorkerJob) -> None:
        # A rank that has ended is reported by `receive`.
        with suppress(RuntimeError):
            dist.send_object_list([job], dst=worker + 1)

    @override
    def receive(self) -> tuple[int, JobResult | None]:
        worker, result = self._results.get()
        if result is None:
            raise RunFailedError(
                f"rank {worker + 1} exited and torchrun stopped all ranks; "
                "run the same command again to resume"
            )
        return worker, result

    @override
    def close(self) -> None:
        """Do nothing, because the ranks end with the command."""

    def _listen(self, worker: int) -> None:
        result: JobResult | None
        while True:
            try:
                result = _receive_object(worker + 1)
            except Exception:
                # The rank has ended, or its message cannot be read.
                result = None
            self._results.put((worker, result))
            if result is None:
                return


def _receive_object(source: int) -> Any:
    slot: list[Any] = [None]
    dist.recv_object_list(slot, src=source)
    return slot[0]


def _serve_rank_zero() -> None:
    """Run jobs until rank 0 ends. If rank 0 is killed, this process also ends during a job."""
    setup = _receive_object(0)
    if setup is END:
        return
    worker = Worker(setup, int(os.environ.get("LOCAL_RANK", "0")))
    run_jobs(worker, _receive_job, _send_result)


def _receive_job() -> Any:
    """Wait for the next job and return the job. If there are no more jobs, end this process."""
    try:
        job = _receive_object(0)
    except RuntimeError:
        os._exit(1)
    if job is END:
        os._exit(0)
    return job


def _send_result(result: JobResult) -> None:
    dist.send_object_list([result.with_checksums()], dst=0)
