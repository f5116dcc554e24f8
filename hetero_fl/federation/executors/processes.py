"""Worker processes on this machine, which exchange long messages through shared memory."""

from __future__ import annotations

import io
import itertools
import multiprocessing.util
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any

import numpy as np
import torch

# Registers how tensors are pickled for other processes.
import torch.multiprocessing
from torch import Tensor
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
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    begin_worker,
    ignore_interrupts_in_children,
    worker_context,
)

# Minimum number of bytes that are sent through shared memory. A pipe is faster for fewer bytes.
LONG = 2**18
# Number of long broadcasts of a round that a worker keeps.
MAX_BROADCASTS = 4
NO_BROADCASTS: Mapping[int, bytes] = {}
# Maximum time in seconds until a process whose pipe is broken has ended.
EXIT_SECONDS = 5.0


class ProcessPool(WorkerPool):
    """Pool of worker processes on this machine.

    Processes that were killed by a signal are replaced. The data sets are moved to shared memory,
    so that workers do not need copies.

    Args:
        setup: Setup of the workers.
        size: Number of workers.
        log: Function that is called with a message when a process is replaced.

    Raises:
        RunFailedError: If shared memory is too small for the data.
    """

    def __init__(
        self, setup: WorkerSetup, size: int, log: Callable[[str], None] = lambda _line: None
    ) -> None:
        super().__init__(size)
        self._setup = replace(setup, shares_memory=True)
        self._log = log
        # Held while processes are replaced or ended: none is started after `close`, and only one
        # thread reads the status of processes.
        self._lock = Lock()
        self._context = worker_context(__name__)
        # Workers put their sockets into this folder, which this process removes at its end.
        multiprocessing.util.get_temp_dir()
        try:
            setup.federation.data.share_memory()
        except RuntimeError as error:
            raise RunFailedError(
                f"runtime.executor: not enough shared memory for the workers' data ({error}); "
                "use serial or batched"
            ) from None
        self._workers = [self._start(index) for index in range(size)]

    @override
    def exchange(self, worker: int, job: WorkerJob) -> JobResult:
        _, connection = self._workers[worker]
        requests = job.requests.values()
        broadcasts = {id(r.body): r.body for r in requests if r.size >= LONG}
        try:
            connection.send(job, broadcasts, max(request.round_idx for request in requests))
            result: JobResult = connection.receive()
        except (OSError, EOFError):
            raise WorkerDiedError from None
        return result

    @override
    def replace_worker(self, worker: int) -> None:
        with self._lock:
            if self._jobs.is_closed:
                return
            process, _ = self._workers[worker]
            # The pipe breaks slightly before the exit status is known.
            process.join(EXIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            if process.exitcode == UNGUARDED:
                raise UserError(ADVICE)
            if process.exitcode is not None and process.exitcode >= 0:
                raise RunFailedError(
                    f"a worker process exited with status {process.exitcode}; see its error output"
                )
            self._log("a worker process was killed; its task starts again in a new process")
            self._workers[worker] = self._start(worker)

    @override
    def stop_workers(self) -> None:
        with self._lock:
            for process, _ in self._workers:
                process.kill()
                process.join()

    def _start(self, index: int) -> tuple[BaseProcess, MessageConnection]:
        parent_end, child_end = self._context.Pipe()
        process = self._context.Process(
            target=serve_jobs,
            args=(child_end, self._setup, index, dict(os.environ)),
            daemon=True,
            name=f"hetero_fl worker {index}",
        )
        with ignore_interrupts_in_children():
            process.start()
        child_end.close()
        return process, MessageConnection(parent_end)


def serve_jobs(
    connection: Connection, setup: WorkerSetup, index: int, environ: Mapping[str, str]
) -> None:
    """Run the jobs of a worker process until the other end of the connection is closed.

    Args:
        connection: The worker's end of the pipe.
        setup: Setup of the workers.
        index: Index of the worker.
        environ: Environment variables of the parent process, which are adopted.
    """
    begin_worker(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(setup, index)
    messages = MessageConnection(connection)
    while True:
        try:
            job: WorkerJob = messages.receive()
        except EOFError:
            return
        messages.send(worker.run_job(job))


class MessageConnection:
    """One end of a pipe, which exchanges long messages through shared memory.

    The two ends send in turn. Both use the same memory, which is replaced by a larger block for a
    longer message.

    Args:
        pipe: This end of the pipe.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._block = torch.empty(0, dtype=torch.uint8)
        # Broadcasts of a round that the other end has received from this end, or the reverse. The
        # keys are the ids of the byte strings at the sender.
        self._sent: dict[int, bytes] = {}
        self._received: dict[int, bytes] = {}
        self._round_idx = 0

    def send(
        self, message: Any, broadcasts: Mapping[int, bytes] = NO_BROADCASTS, round_idx: int = 0
    ) -> None:
        """Send a message.

        Args:
            message: The message.
            broadcasts: Long byte strings in the message, keyed by id. The other end keeps them for
                the next messages of the round, so that they are sent and decoded only once.
            round_idx: Index of the round.

        Raises:
            OSError: If the other process has ended.
        """
        new = {key: value for key, value in broadcasts.items() if key not in self._sent}
        if round_idx != self._round_idx or len(self._sent) + len(new) > MAX_BROADCASTS:
            self._sent.clear()
            self._round_idx = round_idx
            new = dict(broadcasts)
        kept = list(self._sent)
        self._sent |= new
        file = io.BytesIO()
        pickler = MessagePickler(file, self._sent)
        pickler.dump(message)
        buffers = [*(memoryview(value) for value in new.values()), *pickler.buffers]
        sizes = [buffer.nbytes for buffer in buffers]
        self._pipe.send((file.getvalue(), kept, list(new), sizes, self._store(buffers)))

    def receive(self) -> Any:
        """Wait for the next message, and return it. The message does not refer to shared memory.

        Raises:
            EOFError: If the other end is closed.
            OSError: If the other process has ended.
        """
        pickled, kept, new, sizes, stored = self._pipe.recv()
        if isinstance(stored, Tensor):
            self._block = stored
        view = memoryview(stored) if isinstance(stored, bytes) else self._block.numpy().data
        ends = itertools.accumulate(sizes)
        buffers = (view[end - size : end] for end, size in zip(ends, sizes, strict=True))
        self._received = {key: self._received[key] for key in kept}
        self._received |= {key: bytes(next(buffers)) for key in new}
        return MessageUnpickler(io.BytesIO(pickled), buffers, self._received).load()

    def _store(self, buffers: Sequence[memoryview]) -> bytes | Tensor | None:
        """Write buffers to shared memory, one after the other.

        Returns:
            What the other end needs to read the buffers: the new block if the block was too small,
            and the bytes themselves if they are short or there is not enough shared memory, which
            may be limited to 64 MB in a container.
        """
        size = sum(buffer.nbytes for buffer in buffers)
        if size < LONG:
            return b"".join(buffers)
        new = None
        if len(self._block) < size:
            try:
                new = torch.empty(size, dtype=torch.uint8).share_memory_()
            except RuntimeError:
                return b"".join(buffers)
            self._block = new
        view = self._block.numpy().data
        start = 0
        for buffer in buffers:
            view[start : start + buffer.nbytes] = buffer
            start += buffer.nbytes
        return new


class MessagePickler(pickle.Pickler):
    """Pickler that replaces tensors and long byte strings in messages by placeholders.

    Args:
        file: Stream to which the message is written.
        known: Byte strings that the receiver has, keyed by id.

    Attributes:
        buffers: The tensors and the other long byte strings, in order.
    """

    def __init__(self, file: io.BytesIO, known: Mapping[int, bytes]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.buffers: list[memoryview] = []
        self._known = known

    @override
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            array = obj.detach().cpu().contiguous().numpy()
            self.buffers.append(array.reshape(-1).view(np.uint8).data)
            return "tensor", array.dtype, array.shape
        if type(obj) is not bytes or len(obj) < LONG:
            return None
        if id(obj) in self._known:
            return "known", id(obj)
        self.buffers.append(memoryview(obj))
        return ("bytes",)


class MessageUnpickler(pickle.Unpickler):
    """Unpickler of the messages of `MessagePickler`.

    Args:
        file: The pickled message.
        buffers: The tensors and byte strings that were replaced, in order, which are copied.
        known: Byte strings that were received before, keyed by id at the sender.
    """

    def __init__(
        self, file: io.BytesIO, buffers: Iterator[memoryview], known: Mapping[int, bytes]
    ) -> None:
        super().__init__(file)
        self._buffers = buffers
        self._known = known

    @override
    def persistent_load(self, pid: Any) -> Any:
        kind, *about = pid
        if kind == "known":
            return self._known[about[0]]
        buffer = next(self._buffers)
        if kind == "bytes":
            return bytes(buffer)
        dtype, shape = about
        return torch.from_numpy(np.frombuffer(bytearray(buffer), dtype).reshape(shape))
