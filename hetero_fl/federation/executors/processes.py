"""Workers in processes on this machine, with messages in shared memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from hetero_fl.federation.executors.workers import JobResult, Worker, WorkerJob, WorkerSetup
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.processes import ADVICE, UNGUARDED, ignore_interrupts_in_children

# Messages between two processes that speak in turn: over a pipe, but for long byte strings, which
# lie in shared memory.
#
# A pipe takes every byte through the kernel in small pieces, with both processes waiting; a model
# costs tens of milliseconds. In shared memory it is copied in and copied out; what finds no room
# there goes through the pipe after all. What the other side still has, as the broadcast of a group
# that was sent for another of its members, is named and not sent again.

LONG = 2**16  # bytes from which a string does not travel through the pipe


@dataclass(frozen=True)
class StringReference:
    """Stands for a long string: its number, and where it lies if it is new."""

    number: int
    start: int = 0
    stop: int = 0


class SharedMemoryConnection:
    """One end of a connection. Sends and receives in turn: an answer shows that what was sent has been read.

    Messages are dictionaries, lists and dataclasses, with strings of bytes anywhere among their values.

    Args:
        sent, got: how many of the last long strings that were sent and received are remembered; at the other end it is the
            other way round.
    """

    def __init__(
        self, connection: Connection, sent_strings: int = 0, received_strings: int = 0
    ) -> None:
        self.connection = connection
        self._ours = SharedMemoryBlock()
        self._theirs = SharedMemoryBlock()
        self._sent = StringCache(sent_strings)
        self._got = StringCache(received_strings)

    def send(self, message: Any) -> None:
        """Hand a message over. Raises OSError if nobody is there any more."""
        new: list[bytes] = []
        at = 0

        def to_reference(value: Any) -> Any:
            nonlocal at
            if type(value) is not bytes or len(value) < LONG:
                return value
            if (number := self._sent.find(value)) is not None:
                return StringReference(number)
            new.append(value)
            start = at
            at = at + len(value)
            return StringReference(self._sent.add(value), start, at)

        message = map_values(message, to_reference)
        told = self._ours.fill(new)
        self._sent.trim()
        self.connection.send((told, message))

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError if none can come."""
        told, message = self.connection.recv()
        if isinstance(told, Tensor):
            self._theirs.tensor = told
        strings = memoryview(told) if isinstance(told, bytes) else self._theirs.view()

        def from_reference(value: Any) -> Any:
            if type(value) is not StringReference:
                return value
            if value.stop:
                # one's own: the memory is written again
                self._got.add(bytes(strings[value.start : value.stop]))
            return self._got.strings[value.number]

        message = map_values(message, from_reference)
        self._got.trim()
        return message


def map_values(value: Any, change: Callable[[Any], Any]) -> Any:
    """The message with its values changed one by one; what holds them is made anew."""
    if isinstance(value, dict):
        return {k: map_values(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [map_values(v, change) for v in value]
    if is_dataclass(value) and not isinstance(value, StringReference | type):
        return replace(
            value, **{f.name: map_values(getattr(value, f.name), change) for f in fields(value)}
        )
    return change(value)


class SharedMemoryBlock:
    """A piece of shared memory, replaced by a larger one when it has become too small."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def fill(self, strings: list[bytes]) -> Tensor | bytes | None:
        """Put the strings in, one after the other. What the other side has to be told: the memory, if it is another one than
        before, or all of the strings, if there is no room for it (the shared memory of a container may be 64 MB)."""
        size = sum(map(len, strings))
        grown = None
        if size > len(self.view()):
            try:
                self.tensor = grown = torch.empty(size, dtype=torch.uint8).share_memory_()
            except RuntimeError:
                return b"".join(strings)
        at = 0
        view = self.view()
        for string in strings:
            view[at : at + len(string)] = string
            at += len(string)
        return grown

    def view(self) -> memoryview:
        """Its bytes."""
        return memoryview(b"") if self.tensor is None else memoryview(self.tensor.numpy().data)


class StringCache:
    """The last long strings that went one way, numbered. Both ends forget the same ones."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.strings: OrderedDict[int, bytes] = OrderedDict()
        # identity -> number; the strings are alive, so identities are theirs
        self._numbers: dict[int, int] = {}
        self._next = 0

    def add(self, string: bytes) -> int:
        """One more; its number."""
        number = self._next
        self._next = self._next + 1
        self.strings[number] = string
        self._numbers[id(string)] = number
        return number

    def find(self, string: bytes) -> int | None:
        """The number of this very string, if it is remembered."""
        return self._numbers.get(id(string))

    def trim(self) -> None:
        """Forget the oldest. Between messages only: within one, all of its strings are known."""
        while len(self.strings) > self.most:
            _, string = self.strings.popitem(last=False)
            del self._numbers[id(string)]


# Workers in processes of their own on this machine: spawned once, kept for the run, replaced when
# one dies.

BROADCASTS = 2  # that both sides remember: a worker's clients mostly receive the same
LEAVING = 5.0  # seconds that a process whose pipe is broken may take to end


class ProcessPool:
    """A crew of processes. Examples lie in shared memory, and are never copied."""

    def __init__(self, setup: WorkerSetup, size: int) -> None:
        self.size = size
        self._setup = setup
        self._context = mp.get_context("spawn")
        self._crew: list[tuple[BaseProcess, SharedMemoryConnection]] = []
        try:
            setup.federation.data.share_memory()
        except RuntimeError as error:
            raise RunFailedError(
                f"runtime.executor: no shared memory for workers' data ({error}); serial needs none"
            ) from None
        try:
            for i in range(size):
                self._crew.append(self._start(i))
        except BaseException:
            self.close()
            raise

    def send(self, worker: int, job: WorkerJob) -> None:
        with self._speaking_to(worker) as carrier:
            carrier.send(job)

    def receive(self) -> tuple[int, JobResult | None]:
        ready: set[object] = set(
            wait([end for p, carrier in self._crew for end in (p.sentinel, carrier.connection)])
        )
        for worker, (_, carrier) in enumerate(self._crew):
            if carrier.connection in ready:
                with self._speaking_to(worker):
                    return worker, carrier.receive()
        dead = next(
            i
            for i, (p, carrier) in enumerate(self._crew)
            if {p.sentinel, carrier.connection} & ready
        )
        self._release_dead(dead)
        self._crew[dead] = self._start(dead)
        return dead, None

    def close(self) -> None:
        for i in range(len(self._crew)):
            self._end(i)
        self._crew.clear()

    @contextlib.contextmanager
    def _speaking_to(self, worker: int) -> Iterator[SharedMemoryConnection]:
        """If it is dead, `receive` will tell. If this process is interrupted, the worker is ended: half of a message, or one
        that is lost, leaves the two ends waiting for each other."""
        process, carrier = self._crew[worker]
        try:
            yield carrier
        except (OSError, EOFError):
            pass
        except BaseException:
            process.kill()
            process.join()
            raise

    def _start(self, index: int) -> tuple[BaseProcess, SharedMemoryConnection]:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=run_worker,
            args=(there, self._setup, index),
            daemon=True,
            name=f"hetero_fl worker {index}",
        )
        with ignore_interrupts_in_children():
            process.start()
        there.close()
        return process, SharedMemoryConnection(here, sent_strings=BROADCASTS)

    def _release_dead(self, index: int) -> None:
        """Give a dead worker's remains back. Raises UserError or RunFailedError if another one would end in the same way."""
        process, _ = self._crew[index]
        process.join(LEAVING)  # its pipe breaks a moment before its status is known
        self._end(index)
        if process.exitcode == UNGUARDED:
            raise UserError(ADVICE)
        if process.exitcode is not None and process.exitcode >= 0:  # by itself, not by a signal
            raise RunFailedError(
                f"a worker process ended with status {process.exitcode}; it has printed why, if it knew"
            )

    def _end(self, index: int) -> None:
        process, carrier = self._crew[index]
        carrier.connection.close()
        process.kill()  # it keeps nothing
        process.join()


def run_worker(connection: Connection, setup: WorkerSetup, index: int) -> None:
    """A worker's life: jobs until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    worker = Worker(setup, index)
    carrier = SharedMemoryConnection(connection, received_strings=BROADCASTS)
    with contextlib.suppress(EOFError, OSError):
        while True:
            carrier.send(worker.run_job(carrier.receive()))


def _exit_with_parent() -> None:
    """End when the run has been killed, in the middle of a job too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
