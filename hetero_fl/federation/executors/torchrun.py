"""Workers as the ranks of a job that torchrun launched: rank 0 runs the command, the others its jobs.

Jobs travel through torch.distributed with gloo, as NCCL carries only tensors on a GPU. Rank 0 has a
thread that waits for each of the others, so that it still receives Ctrl-C. When a rank dies,
torchrun ends the whole job.
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

from hetero_fl.federation.executors.workers import (
    JobResult,
    Worker,
    WorkerJob,
    WorkerSetup,
    run_jobs,
)
from hetero_fl.utils.errors import RunFailedError

# A rank waits as long as another one works; torchrun itself notices when one dies.
NO_TIMEOUT = timedelta(days=20)
START_TIMEOUT = timedelta(minutes=10)  # until all ranks are connected
EXIT_SECONDS = 10.0  # that ranks may take to end
END = None  # sent in place of a job when the run is over
_listeners: list[threading.Thread] = []  # of rank 0


def num_ranks() -> int:
    """Return the number of processes that torchrun started, this one included; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_as_ranks(lead: Callable[[], int]) -> int:
    """Run a command in rank 0 and its jobs in the others, which end silently when rank 0 does.

    Returns:
        The exit status.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 handles it and ends the others
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
        for number in (signal.SIGINT, signal.SIGTERM):  # handled already, or too late
            signal.signal(number, signal.SIG_IGN)
        for other in range(1, size):
            with suppress(RuntimeError):  # it has ended
                dist.send_object_list([END], dst=other)
        for listener in _listeners:
            listener.join(EXIT_SECONDS)
        dist.destroy_process_group()


class TorchrunPool:
    """Ranks of a torchrun job: worker i is rank i + 1. A command creates one pool for its whole run."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.size = dist.get_world_size() - 1
        self._results: queue.SimpleQueue[tuple[int, JobResult | None]] = queue.SimpleQueue()
        for worker in range(self.size):
            dist.send_object_list([setup], dst=worker + 1)
            _listeners.append(threading.Thread(target=self._listen, args=(worker,), daemon=True))
            _listeners[-1].start()

    def send(self, worker: int, job: WorkerJob) -> None:
        with suppress(RuntimeError):  # it has ended, which `receive` reports
            dist.send_object_list([job], dst=worker + 1)

    def receive(self) -> tuple[int, JobResult | None]:
        worker, done = self._results.get()
        if done is None:
            raise RunFailedError(
                f"rank {worker + 1} is gone, and torchrun ends the job; the same command goes on with --resume"
            )
        return worker, done

    def close(self) -> None:
        """Do nothing: the ranks end with the command."""

    def _listen(self, worker: int) -> None:
        done: JobResult | None
        while True:
            try:
                done = _receive_object(worker + 1)
            except Exception:  # the rank has ended, or its message cannot be read
                done = None
            self._results.put((worker, done))
            if done is None:
                return


def _receive_object(source: int) -> Any:
    slot: list[Any] = [None]
    dist.recv_object_list(slot, src=source)
    return slot[0]


def _serve_rank_zero() -> None:
    """Run jobs until rank 0 is done. If it fails or is killed, end the process even during a job."""
    setup = _receive_object(0)
    if setup is END:
        return
    worker = Worker(setup, int(os.environ.get("LOCAL_RANK", "0")))
    run_jobs(worker, _receive_job, _send_result)


def _receive_job() -> Any:
    """Wait for the next job; end the process if there is none."""
    try:
        job = _receive_object(0)
    except RuntimeError:
        os._exit(1)
    if job is END:
        os._exit(0)
    return job


def _send_result(result: JobResult) -> None:
    dist.send_object_list([result.with_checksums()], dst=0)
