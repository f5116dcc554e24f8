"""Workers as torchrun ranks: rank 0 runs the command, and the other ranks run jobs.

Jobs are sent with the gloo backend of torch.distributed, because NCCL can send only tensors on a
GPU. When a rank dies, torchrun ends all ranks.
"""

from __future__ import annotations

import os
import signal
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
)
from hetero_fl.utils.errors import RunFailedError

# Ranks wait for each other without a time limit, because torchrun detects ranks that have died.
NO_TIMEOUT = timedelta(days=20)
# Maximum time until all ranks are connected.
START_TIMEOUT = timedelta(minutes=10)
# Object that is sent instead of a job at the end of the run.
END = None


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
        dist.destroy_process_group()


class TorchrunPool(WorkerPool):
    """Pool of the ranks that torchrun has started, in which worker i is rank i + 1.

    A command must create only one pool. If a rank ends, the run fails.

    Args:
        setup: Setup of the workers.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(dist.get_world_size() - 1)
        for worker in range(self.size):
            dist.send_object_list([setup], dst=worker + 1)

    @override
    def exchange(self, worker: int, job: WorkerJob) -> JobResult:
        rank = worker + 1
        try:
            dist.send_object_list([job], dst=rank)
            result: JobResult = _receive_object(rank)
        except RuntimeError as error:
            raise RunFailedError(
                f"rank {rank} exited and torchrun stopped all ranks; "
                "run the same command again to resume"
            ) from error
        return result

    @override
    def replace_worker(self, worker: int) -> None:
        """Do nothing, because torchrun ends all ranks if one ends."""

    @override
    def stop_workers(self) -> None:
        """Do nothing. The ranks finish running jobs, and end with the command."""


def _receive_object(source: int) -> Any:
    slot: list[Any] = [None]
    dist.recv_object_list(slot, src=source)
    return slot[0]


def _serve_rank_zero() -> None:
    """Run jobs until rank 0 ends."""
    setup = _receive_object(0)
    if setup is END:
        return
    worker = Worker(setup, int(os.environ.get("LOCAL_RANK", "0")))
    # If rank 0 has ended, torchrun reports the failure.
    with suppress(RuntimeError):
        while (job := _receive_object(0)) is not END:
            dist.send_object_list([worker.run_job(job)], dst=0)
