"""Workers in processes of their own on this machine: spawned once, kept for the run, replaced when one dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch.multiprocessing as mp

from hetero_fl.children import ADVICE, UNGUARDED, deaf_children
from hetero_fl.errors import RunFailed, UserError
from hetero_fl.runtime.crews.carrier import Carrier
from hetero_fl.runtime.jobs import Done, Job, Setup, Worker

BROADCASTS = 2  # that both sides remember: a worker's clients mostly receive the same
LEAVING = 5.0  # seconds that a process whose pipe is broken may take to end


class Processes:
    """A crew of processes. Examples lie in shared memory, and are never copied."""

    def __init__(self, setup: Setup, size: int) -> None:
        self.size = size
        self._setup = setup
        self._context = mp.get_context("spawn")
        self._crew: list[tuple[BaseProcess, Carrier]] = []
        try:
            setup.federation.data.share_memory()
        except RuntimeError as error:
            raise RunFailed(
                f"runtime.executor: no shared memory for workers' data ({error}); serial needs none"
            ) from None
        try:
            for i in range(size):
                self._crew.append(self._start(i))
        except BaseException:
            self.close()
            raise

    def send(self, worker: int, job: Job) -> None:
        with self._speaking(worker) as carrier:
            carrier.send(job)

    def receive(self) -> tuple[int, Done | None]:
        ready: set[object] = set(wait([end for p, carrier in self._crew for end in (p.sentinel, carrier.connection)]))
        for worker, (_, carrier) in enumerate(self._crew):
            if carrier.connection in ready:
                with self._speaking(worker):
                    return worker, carrier.recv()
        dead = next(i for i, (p, carrier) in enumerate(self._crew) if {p.sentinel, carrier.connection} & ready)
        self._bury(dead)
        self._crew[dead] = self._start(dead)
        return dead, None

    def close(self) -> None:
        for i in range(len(self._crew)):
            self._end(i)
        self._crew.clear()

    @contextlib.contextmanager
    def _speaking(self, worker: int) -> Iterator[Carrier]:
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

    def _start(self, index: int) -> tuple[BaseProcess, Carrier]:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(there, self._setup, index), daemon=True, name=f"hetero_fl worker {index}"
        )
        with deaf_children():
            process.start()
        there.close()
        return process, Carrier(here, sent=BROADCASTS)

    def _bury(self, index: int) -> None:
        """Give a dead worker's remains back. Raises UserError or RunFailed if another one would end in the same way."""
        process, _ = self._crew[index]
        process.join(LEAVING)  # its pipe breaks a moment before its status is known
        self._end(index)
        if process.exitcode == UNGUARDED:
            raise UserError(ADVICE)
        if process.exitcode is not None and process.exitcode >= 0:  # by itself, not by a signal
            raise RunFailed(f"a worker process ended with status {process.exitcode}; it has printed why, if it knew")

    def _end(self, index: int) -> None:
        process, carrier = self._crew[index]
        carrier.connection.close()
        process.kill()  # it keeps nothing
        process.join()


def work(connection: Connection, setup: Setup, index: int) -> None:
    """A worker's life: jobs until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    worker, carrier = Worker(setup, index), Carrier(connection, got=BROADCASTS)
    with contextlib.suppress(EOFError, OSError):
        while True:
            carrier.send(worker.do(carrier.recv()))


def _follow_parent() -> None:
    """End when the run has been killed, in the middle of a job too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
