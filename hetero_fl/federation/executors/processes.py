"""Worker processes on this machine, which exchange messages through shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import cycle
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch

# Registers how tensors are pickled for pipes.
import torch.multiprocessing
from torch import Tensor
from typing_extensions import override

from hetero_fl.core.payload import Payload
from hetero_fl.federation.executors.workers import (
    JobResult,
    Worker,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
    run_jobs,
)
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import (
    ADVICE,
    UNGUARDED,
    adopt_environment,
    exit_with_parent,
    ignore_interrupts_in_children,
    worker_context,
)

# Minimum length in bytes of byte strings that are sent through shared memory. Tensors of any size
# are sent through shared memory.
LONG = 2**16
# Number of broadcasts that both ends of a connection cache, because many clients receive the same
# broadcast.
BROADCASTS = 2
# Types of values that need no conversion.
PLAIN = (str, int, float, bool, type(None))
# Maximum time in seconds until a process whose pipe is broken has ended.
EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class StringReference:
    """Placeholder for a long byte string in a message.

    Attributes:
        number: Number of the string in the caches of both ends.
        start: Offset of the first byte in shared memory. 0 if the string is in the caches.
        stop: Offset after the last byte. 0 if the string is in the caches.
    """

    number: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class TensorReference:
    """Placeholder for a tensor in a message.

    Attributes:
        dtype: Data type of the tensor.
        shape: Shape of the tensor.
        start: Offset of the first byte in shared memory.
        stop: Offset after the last byte.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class SharedMemoryConnection:
    """One end of a connection between two processes, with shared memory for large messages.

    Messages are dictionaries, lists, dataclasses and payloads, which may contain byte strings and
    tensors. Tensors and long byte strings are copied through shared memory, because a pipe is slow
    for large messages and blocks both processes. Everything else is sent through a pipe. If shared
    memory is full, tensors and byte strings are sent through the pipe, too. A long string that the
    other end has cached, such as the same broadcast to another client, is not sent again.

    Each process must answer messages in order. Messages are written to two blocks of shared memory
    in turn, so a process may send at most two messages before the first message is answered.

    Args:
        connection: This end of the pipe.
        sent_strings: Maximum number of sent long strings that are cached.
        received_strings: Maximum number of received long strings that are cached. Must be equal to
            `sent_strings` of the other end.
    """

    def __init__(
        self, connection: Connection, sent_strings: int = 0, received_strings: int = 0
    ) -> None:
        self.connection = connection
        self._outgoing = cycle((SharedMemoryBlock(), SharedMemoryBlock()))
        self._incoming = cycle((SharedMemoryBlock(), SharedMemoryBlock()))
        self._sent = StringCache(sent_strings)
        self._received = StringCache(received_strings)

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            OSError: If the other process has ended.
        """
        # Bytes to be written to shared memory.
        new: list[memoryview] = []
        message = map_values(message, lambda value: self._to_reference(value, new))
        update = next(self._outgoing).fill(new)
        self._sent.trim()
        self.connection.send((update, message))

    def receive(self) -> Any:
        """Wait for the next message, and return the message.

        Raises:
            EOFError: If the other end is closed.
            OSError: If the other process has ended.
        """
        update, message = self.connection.recv()
        incoming = next(self._incoming)
        if isinstance(update, Tensor):
            incoming.tensor = update
        strings = memoryview(update) if isinstance(update, bytes) else incoming.view()
        message = map_values(message, lambda value: self._from_reference(value, strings))
        self._received.trim()
        return message

    def _to_reference(self, value: Any, new: list[memoryview]) -> Any:
        """Return a reference to a tensor or long string. Other values do not change.

        The bytes that must be written to shared memory are appended to `new`.
        """
        start = sum(map(len, new))
        if isinstance(value, Tensor):
            array = value.detach().cpu().contiguous().numpy()
            new.append(array.reshape(-1).view(np.uint8).data)
            return TensorReference(array.dtype, array.shape, start, start + array.nbytes)
        if type(value) is not bytes or len(value) < LONG:
            return value
        number = self._sent.find(value)
        if number is not None:
            return StringReference(number)
        new.append(memoryview(value))
        return StringReference(self._sent.add(value), start, start + len(value))

    def _from_reference(self, value: Any, block: memoryview) -> Any:
        # The bytes are copied, because a later message overwrites the block.
        if type(value) is TensorReference:
            data = bytearray(block[value.start : value.stop])
            return torch.from_numpy(np.frombuffer(data, value.dtype).reshape(value.shape))
        if type(value) is not StringReference:
            return value
        if value.stop:
            self._received.add(bytes(block[value.start : value.stop]))
        return self._received.strings[value.number]


def map_values(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of a message in which tensors, byte strings and references are replaced.

    Args:
        value: The message.
        change: Function that returns the replacement of a tensor, byte string or reference.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        return {key: map_values(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [map_values(each, change) for each in value]
    if isinstance(value, Payload):
        return Payload(map_values(value.items_by_name, change), value.report)
    if is_dataclass(value) and not isinstance(value, (StringReference, TensorReference, type)):
        changed = {f.name: map_values(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **changed)
    return change(value)


class SharedMemoryBlock:
    """Block of shared memory, which is replaced by a larger block when needed.

    Attributes:
        tensor: The bytes of the block, dtype uint8. None if nothing has been written yet.
    """

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def fill(self, strings: list[memoryview]) -> Tensor | bytes | None:
        """Write byte strings to the block, one after the other.

        Returns:
            The value that must be sent to the other process. If the block has been replaced, the
            tensor of the new block. If there is not enough shared memory, which may be limited to
            64 MB in a container, the joined strings. Otherwise None.
        """
        size = sum(map(len, strings))
        replaced = None
        if size > len(self.view()):
            try:
                replaced = torch.empty(size, dtype=torch.uint8).share_memory_()
            except RuntimeError:
                return b"".join(strings)
            self.tensor = replaced
        view = self.view()
        start = 0
        for string in strings:
            view[start : start + len(string)] = string
            start += len(string)
        return replaced

    def view(self) -> memoryview:
        """Return a writable view of the bytes of the block, which is empty at first."""
        return memoryview(b"") if self.tensor is None else memoryview(self.tensor.numpy().data)


class StringCache:
    """Cache of the latest long strings that were sent in one direction of a connection.

    The caches at both ends of the connection have the same content.

    Args:
        max_strings: Maximum number of strings after `trim`.

    Attributes:
        strings: The strings, keyed by number. Strings are numbered in the order of addition.
    """

    def __init__(self, max_strings: int) -> None:
        self.max_strings = max_strings
        self.strings: OrderedDict[int, bytes] = OrderedDict()
        # Numbers of the strings, keyed by id. Ids are unique, because the cache keeps references to
        # the strings.
        self._numbers: dict[int, int] = {}
        self._next_number = 0

    def add(self, string: bytes) -> int:
        """Add a string, and return the number of the string."""
        number = self._next_number
        self._next_number += 1
        self.strings[number] = string
        self._numbers[id(string)] = number
        return number

    def find(self, string: bytes) -> int | None:
        """Return the number of a string, or None if the string is not cached.

        Strings are compared by identity.
        """
        return self._numbers.get(id(string))

    def trim(self) -> None:
        """Drop the oldest strings until at most `max_strings` strings are cached.

        Call this method only between messages, because a message may refer to all cached strings.
        """
        while len(self.strings) > self.max_strings:
            _, string = self.strings.popitem(last=False)
            del self._numbers[id(string)]


class ProcessPool(WorkerPool):
    """Pool of worker processes on this machine.

    Processes that were killed by a signal are replaced. The data sets are moved to shared memory,
    so that workers do not need copies.

    Args:
        setup: Setup of the workers.
        size: Number of workers.

    Raises:
        RunFailedError: If shared memory is too small for the data.
    """

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size = size
        self._setup = replace(setup, shares_memory=True)
        self._context = worker_context(__name__)
        self._workers: list[tuple[BaseProcess, SharedMemoryConnection]] = []
        # Indices of workers that were ended because sending or receiving was interrupted.
        self._interrupted: set[int] = set()
        try:
            setup.federation.data.share_memory()
        except RuntimeError as error:
            raise RunFailedError(
                f"runtime.executor: not enough shared memory for the workers' data ({error}); "
                "use serial or batched"
            ) from None
        try:
            for i in range(size):
                self._workers.append(self._start(i))
        except BaseException:
            self.close()
            raise

    @override
    def send(self, worker: int, job: WorkerJob) -> None:
        with self._communicate_with(worker) as connection:
            connection.send(job)

    @override
    def receive(self) -> tuple[int, JobResult | None]:
        if self._interrupted:
            return self._replace(self._interrupted.pop())
        # The pipe of a process that has ended may contain a result, which is read first.
        ready = set(
            wait([c.connection for _, c in self._workers] + [p.sentinel for p, _ in self._workers])
        )
        for worker, (_, connection) in enumerate(self._workers):
            if connection.connection in ready:
                with self._communicate_with(worker):
                    return worker, connection.receive()
        dead = next(
            i
            for i, (process, connection) in enumerate(self._workers)
            if {process.sentinel, connection.connection} & ready
        )
        self._check_exit(dead)
        return self._replace(dead)

    @override
    def close(self) -> None:
        for i in range(len(self._workers)):
            self._end(i)
        self._workers.clear()

    @contextlib.contextmanager
    def _communicate_with(self, worker: int) -> Iterator[SharedMemoryConnection]:
        """Return a context in which the connection to a worker is used.

        Errors caused by a dead worker are ignored, because `receive` reports dead workers. If this
        process is interrupted in the context, the worker is killed and later replaced. After an
        incomplete message, both ends would otherwise wait for each other or read the wrong block of
        memory.
        """
        process, connection = self._workers[worker]
        try:
            yield connection
        except (OSError, EOFError):
            pass
        except BaseException:
            self._interrupted.add(worker)
            process.kill()
            process.join()
            raise

    def _replace(self, worker: int) -> tuple[int, None]:
        """Replace a worker, and return the result of `receive` for a worker that has died."""
        self._end(worker)
        self._workers[worker] = self._start(worker)
        return worker, None

    def _start(self, index: int) -> tuple[BaseProcess, SharedMemoryConnection]:
        parent_end, child_end = self._context.Pipe()
        process = self._context.Process(
            target=run_worker,
            args=(child_end, self._setup, index, dict(os.environ)),
            daemon=True,
            name=f"hetero_fl worker {index}",
        )
        with ignore_interrupts_in_children():
            process.start()
        child_end.close()
        return process, SharedMemoryConnection(parent_end, sent_strings=BROADCASTS)

    def _check_exit(self, index: int) -> None:
        """Check that a dead worker was killed by a signal, so that the worker can be replaced.

        Raises:
            UserError: If the `__main__` guard is missing in the user's script.
            RunFailedError: If the process ended by itself, because a new process would also end.
        """
        process, _ = self._workers[index]
        # The pipe breaks slightly before the exit status is known.
        process.join(EXIT_SECONDS)
        if process.exitcode == UNGUARDED:
            raise UserError(ADVICE)
        if process.exitcode is not None and process.exitcode >= 0:
            raise RunFailedError(
                f"a worker process exited with status {process.exitcode}; see its error output"
            )

    def _end(self, index: int) -> None:
        process, connection = self._workers[index]
        connection.connection.close()
        process.kill()
        process.join()


def run_worker(
    connection: Connection, setup: WorkerSetup, index: int, environ: Mapping[str, str]
) -> None:
    """Run the jobs of a worker process until the other end of the connection is closed.

    Args:
        connection: The worker's end of the pipe.
        setup: Setup of the workers.
        index: Index of the worker.
        environ: Environment variables of the parent process, which are adopted.
    """
    adopt_environment(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    worker = Worker(setup, index)
    jobs = SharedMemoryConnection(connection, received_strings=BROADCASTS)
    with contextlib.suppress(EOFError, OSError):
        run_jobs(worker, jobs.receive, jobs.send)
