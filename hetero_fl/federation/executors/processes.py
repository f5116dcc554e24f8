"""Worker processes on this machine, which exchange long messages through shared memory."""

from __future__ import annotations

import io
import itertools
import multiprocessing.util
import os
import pickle
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import Any, ClassVar

import numpy as np
import torch

# Registers how tensors are pickled for other processes.
import torch.multiprocessing
from torch import Tensor
from typing_extensions import override

from hetero_fl.federation.executors.pool import WorkerPool
from hetero_fl.federation.executors.worker import JobResult, Worker, WorkerJob, WorkerSetup
from hetero_fl.utils.caching import BoundedCache, IdentityCache
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    adopt_environment,
    exit_with_parent,
    ignore_interrupts_in_children,
    worker_context,
)

# Minimum number of bytes that are sent through shared memory. A pipe is faster for fewer bytes.
LONG = 2**18
# Number of broadcasts that the server's process and each worker keep.
MAX_BROADCASTS = 4


class ProcessPool(WorkerPool):
    """Pool of worker processes on this machine.

    If a process is killed by a signal, all processes are replaced. The data sets are moved to
    shared memory, so that workers do not need copies.

    Args:
        setup: Setup of the workers.
        size: Number of workers.
        log: Function that is called with a message when processes are replaced.

    Raises:
        RunFailedError: If shared memory is too small for the data.
    """

    def __init__(
        self, setup: WorkerSetup, size: int, log: Callable[[str], None] = lambda _line: None
    ) -> None:
        self.size = size
        self._setup = replace(setup, shares_memory=True)
        self._num_workers = size
        self._log = log
        # Broadcasts in shared memory with their numbers, and memory for the next jobs.
        self._broadcasts: IdentityCache[tuple[int, Tensor | None]] = IdentityCache(MAX_BROADCASTS)
        self._numbers = itertools.count()
        self._round_idx = -1
        self._free_blocks: list[Tensor] = []
        try:
            setup.federation.data.share_memory()
        except RuntimeError as error:
            raise RunFailedError(
                f"runtime.executor: not enough shared memory for the workers' data ({error}); "
                "use serial or batched"
            ) from None
        self._start()

    @override
    def submit(self, job: WorkerJob) -> Future[Parcel]:
        block = self._free_blocks.pop() if self._free_blocks else None
        parcel = pack(job, block, self._share_broadcasts(job))
        try:
            return self._executor.submit(run_job, parcel)
        except BrokenProcessPool as error:
            failed: Future[Parcel] = Future()
            failed.set_exception(error)
            return failed

    @override
    def result(self, future: Future[Parcel]) -> JobResult:
        parcel = future.result()
        result: JobResult = unpack(parcel)
        if parcel.block is not None:
            self._free_blocks.append(parcel.block)
        return result

    @override
    def restart(self) -> None:
        self.close()
        statuses = [process.exitcode or 0 for process in self._processes]
        if UNGUARDED in statuses:
            raise UserError(ADVICE)
        if (status := max(statuses)) >= 0:
            raise RunFailedError(
                f"a worker process exited with status {status}; see its error output"
            )
        self._log("a worker process was killed; its tasks start again in a new process")
        self._start()

    @override
    def close(self) -> None:
        self._stop()

    def _start(self) -> None:
        context = worker_context(__name__)
        # Workers put their sockets into this folder, which this process removes at its end.
        multiprocessing.util.get_temp_dir()
        indices: SimpleQueue[int] = context.SimpleQueue()
        others = multiprocessing.active_children()
        self._executor = ProcessPoolExecutor(
            self._num_workers, context, start_worker, (self._setup, indices, dict(os.environ))
        )
        with ignore_interrupts_in_children():
            # Each call starts a process, because the first one waits for its index.
            for _ in range(self._num_workers):
                self._executor.submit(os.getpid)
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        # Also called when this pool is no longer used, and at the end of this process.
        self._stop = weakref.finalize(self, stop, self._executor, self._processes)
        for index in range(self._num_workers):
            indices.put(index)

    def _share_broadcasts(self, job: WorkerJob) -> dict[int, tuple[int, Tensor]]:
        """Copy the long broadcasts in a job to shared memory, unless they are there.

        Returns:
            Pairs of number and memory, keyed by the id of the byte string.
        """
        shared: dict[int, tuple[int, Tensor]] = {}
        for request in job.requests.values():
            if request.round_idx != self._round_idx:
                self._broadcasts.clear()
                self._round_idx = request.round_idx
            content = request.body
            if len(content) >= LONG:
                copy = partial(self._copy_broadcast, content)
                number, memory = self._broadcasts.get(content, copy)
                if memory is not None:
                    shared[id(content)] = (number, memory)
        return shared

    def _copy_broadcast(self, content: bytes) -> tuple[int, Tensor | None]:
        return next(self._numbers), copy_to_shared_memory([content], None)


def stop(executor: ProcessPoolExecutor, processes: Iterable[BaseProcess]) -> None:
    """End the worker processes of an executor, even if they are busy."""
    for process in processes:
        process.kill()
    executor.shutdown(cancel_futures=True)


class WorkerProcess:
    """State of a worker process.

    Args:
        worker: The worker.

    Attributes:
        current: The state of this process.
    """

    current: ClassVar[WorkerProcess]

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._broadcasts: BoundedCache[bytes] = BoundedCache(MAX_BROADCASTS)

    def run(self, parcel: Parcel) -> Parcel:
        """Run the job in a parcel, and return a parcel with the result in the same memory."""
        # Clients that receive the same broadcast have the same object, which is decoded once.
        broadcasts = {}
        for number, memory in parcel.broadcasts.items():
            broadcasts[number] = self._broadcasts.get(number) or memory.numpy().tobytes()
            self._broadcasts[number] = broadcasts[number]
        job: WorkerJob = unpack(parcel, broadcasts)
        return pack(self._worker.run_job(job), parcel.block)


def start_worker(setup: WorkerSetup, indices: SimpleQueue[int], environ: Mapping[str, str]) -> None:
    """Initialize a worker process.

    Args:
        setup: Setup of the workers.
        indices: Queue from which the process takes the index of its worker.
        environ: Environment variables of the parent process, which are adopted.
    """
    adopt_environment(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    WorkerProcess.current = WorkerProcess(Worker(setup, indices.get()))


def run_job(parcel: Parcel) -> Parcel:
    """Run a job in a worker process."""
    return WorkerProcess.current.run(parcel)


@dataclass
class Parcel:
    """Pickled message with its tensors and long byte strings.

    Attributes:
        pickled: The message without tensors and long byte strings.
        sizes: Number of bytes of each tensor and long byte string.
        data: The tensors and byte strings, one after the other. Empty if they are in `block`.
        block: Shared memory, dtype uint8, which the receiver may overwrite. None if all messages
            are short or there is not enough shared memory.
        broadcasts: Shared memory with the broadcasts in the message, keyed by number.
    """

    pickled: bytes
    sizes: list[int]
    data: bytes
    block: Tensor | None
    broadcasts: dict[int, Tensor] = field(default_factory=dict)


def pack(
    message: Any, block: Tensor | None, shared: Mapping[int, tuple[int, Tensor]] | None = None
) -> Parcel:
    """Pack a message for another process.

    Args:
        message: The message.
        block: Shared memory for the message. It is replaced if it is too small.
        shared: Byte strings in shared memory, as pairs of number and memory, keyed by id.
    """
    file = io.BytesIO()
    pickler = MessagePickler(file, shared or {})
    pickler.dump(message)
    sizes = [buffer.nbytes for buffer in pickler.buffers]
    if block is not None or sum(sizes) >= LONG:
        block = copy_to_shared_memory(pickler.buffers, block)
    data = b"".join(pickler.buffers) if block is None else b""
    return Parcel(file.getvalue(), sizes, data, block, pickler.broadcasts)


def copy_to_shared_memory(buffers: list[Any], block: Tensor | None) -> Tensor | None:
    """Write buffers to shared memory, one after the other.

    Args:
        buffers: The buffers.
        block: Shared memory to be used if it is large enough.

    Returns:
        The shared memory, dtype uint8, or None if there is not enough of it, which may be limited
        to 64 MB in a container.
    """
    size = sum(memoryview(buffer).nbytes for buffer in buffers)
    if block is None or len(block) < size:
        try:
            block = torch.empty(size, dtype=torch.uint8).share_memory_()
        except RuntimeError:
            return None
    view = block.numpy().data
    start = 0
    for buffer in buffers:
        view[start : start + len(buffer)] = buffer
        start += len(buffer)
    return block


def unpack(parcel: Parcel, broadcasts: Mapping[int, bytes] | None = None) -> Any:
    """Return the message in a parcel, which does not refer to the shared memory.

    Args:
        parcel: The parcel.
        broadcasts: The broadcasts in the message, keyed by number.
    """
    block = parcel.block
    view = memoryview(parcel.data) if block is None else block.numpy().data
    ends = itertools.accumulate(parcel.sizes)
    buffers = (view[end - size : end] for end, size in zip(ends, parcel.sizes, strict=True))
    return MessageUnpickler(io.BytesIO(parcel.pickled), buffers, broadcasts or {}).load()


class MessagePickler(pickle.Pickler):
    """Pickler that replaces tensors and long byte strings in messages by placeholders.

    Args:
        file: Stream to which the message is written.
        shared: Byte strings in shared memory, as pairs of number and memory, keyed by id.

    Attributes:
        buffers: The tensors and byte strings that have been replaced, in order.
        broadcasts: Memory of the shared byte strings that have been replaced, keyed by number.
    """

    def __init__(self, file: io.BytesIO, shared: Mapping[int, tuple[int, Tensor]]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.buffers: list[memoryview] = []
        self.broadcasts: dict[int, Tensor] = {}
        self._shared = shared

    @override
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            array = obj.detach().cpu().contiguous().numpy()
            self.buffers.append(array.reshape(-1).view(np.uint8).data)
            return "tensor", array.dtype, array.shape
        if type(obj) is not bytes or len(obj) < LONG:
            return None
        if id(obj) in self._shared:
            number, memory = self._shared[id(obj)]
            self.broadcasts[number] = memory
            return "broadcast", number
        self.buffers.append(memoryview(obj))
        return ("bytes",)


class MessageUnpickler(pickle.Unpickler):
    """Unpickler of the messages of `MessagePickler`.

    Args:
        file: The pickled message.
        buffers: The tensors and byte strings that were replaced, in order, which are copied.
        broadcasts: The shared byte strings, keyed by number.
    """

    def __init__(
        self, file: io.BytesIO, buffers: Iterator[memoryview], broadcasts: Mapping[int, bytes]
    ) -> None:
        super().__init__(file)
        self._buffers = buffers
        self._broadcasts = broadcasts

    @override
    def persistent_load(self, pid: Any) -> Any:
        kind, *about = pid
        if kind == "broadcast":
            return self._broadcasts[about[0]]
        buffer = next(self._buffers)
        if kind == "bytes":
            return bytes(buffer)
        dtype, shape = about
        return torch.from_numpy(np.frombuffer(bytearray(buffer), dtype).reshape(shape))
