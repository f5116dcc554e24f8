"""Workers as the ranks of a job that torchrun launched: rank 0 carries out the run, the others work for it.

Jobs travel through torch.distributed, by gloo (NCCL would carry nothing but tensors of a GPU). Rank 0 has a thread that waits
for each of the others, so that it hears Ctrl-C itself. A rank that dies ends the job, which is torchrun's way.
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

from hetero_fl.federation.executors.workers import JobResult, Worker, WorkerJob, WorkerSetup
from hetero_fl.utils.errors import RunFailedError

# a rank waits as long as another one works; torchrun itself notices who dies
FOREVER = timedelta(days=20)
MEETING = timedelta(minutes=10)  # that ranks may take to come together
LEAVING = 10.0  # seconds that ranks may take to end
END = None  # in place of a job: the run is over
_listeners: list[threading.Thread] = []  # of rank 0


def num_ranks() -> int:
    """How many of them torchrun started, this one included; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def run_as_ranks(lead: Callable[[], int]) -> int:
    """Carry out a command in rank 0, and work for it in the others. Returns the exit status.

    However rank 0 ends, the others end with it, without a word.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 hears it, and ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store, rank, size = next(dist.rendezvous("env://", timeout=MEETING))
    # Addresses of an earlier attempt (torchrun --max-restarts) may still lie in the store, and lead nowhere.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=FOREVER)
    if rank > 0:
        _serve_rank_zero()
        return 0
    try:
        return lead()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # heard already, or too late
            signal.signal(number, signal.SIG_IGN)
        for other in range(1, size):
            with suppress(RuntimeError):  # it is gone
                dist.send_object_list([END], dst=other)
        for listener in _listeners:
            listener.join(LEAVING)
        dist.destroy_process_group()


class TorchrunPool:
    """A crew of ranks: worker i is rank i + 1. A run has one, from beginning to end."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.size = dist.get_world_size() - 1
        self._results: queue.SimpleQueue[tuple[int, JobResult | None]] = queue.SimpleQueue()
        for worker in range(self.size):
            dist.send_object_list([setup], dst=worker + 1)
            _listeners.append(threading.Thread(target=self._listen, args=(worker,), daemon=True))
            _listeners[-1].start()

    def send(self, worker: int, job: WorkerJob) -> None:
        with suppress(RuntimeError):  # gone: `receive` will tell
            dist.send_object_list([job], dst=worker + 1)

    def receive(self) -> tuple[int, JobResult | None]:
        worker, done = self._results.get()
        if done is None:
            raise RunFailedError(
                f"rank {worker + 1} is gone, and torchrun ends the job; the same command goes on with --resume"
            )
        return worker, done

    def close(self) -> None:
        """Nothing yet: the ranks are let go when the command ends."""

    def _listen(self, worker: int) -> None:
        done: JobResult | None
        while True:
            try:
                done = _receive_job(worker + 1)
            except Exception:  # the rank is gone, or what it says cannot be read
                done = None
            self._results.put((worker, done))
            if done is None:
                return


def _receive_job(source: int) -> Any:
    slot: list[Any] = [None]
    dist.recv_object_list(slot, src=source)
    return slot[0]


def _serve_rank_zero() -> None:
    """Work for rank 0 until it is done. Ends the process at once, in the middle of a job too, if it fails or is gone."""
    jobs: queue.SimpleQueue[WorkerJob] = queue.SimpleQueue()
    setup = _receive_job(0)
    if setup is END:
        return
    worker = Worker(setup, int(os.environ.get("LOCAL_RANK", "0")))
    threading.Thread(target=_listen_to_lead, args=(jobs,), daemon=True).start()
    while True:
        dist.send_object_list([worker.run_job(jobs.get()).with_checksums()], dst=0)


def _listen_to_lead(jobs: queue.SimpleQueue[WorkerJob]) -> None:
    try:
        while (job := _receive_job(0)) is not END:
            jobs.put(job)
    except RuntimeError:
        os._exit(1)
    os._exit(0)
