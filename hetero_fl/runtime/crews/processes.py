"""Workers in processes of their own on this machine: spawned once, kept for the run, replaced when one dies."""

from __future__ import annotations

import contextlib
import signal
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch.multiprocessing as mp

from hetero_fl.runtime.jobs import Done, Job, Setup, Worker


class Processes:
    """A crew of processes. Data lies in shared memory: sent once, and never copied."""

    def __init__(self, setup: Setup, size: int) -> None:
        self.size = size
        self._setup = setup
        self._context = mp.get_context("spawn")
        setup.federation.data.share_memory()
        self._crew = [self._start(i) for i in range(size)]

    def send(self, worker: int, job: Job) -> None:
        with contextlib.suppress(OSError):  # dead already: `receive` will tell
            self._crew[worker][1].send(job)

    def receive(self) -> tuple[int, Done | None]:
        ends = {connection: i for i, (_, connection) in enumerate(self._crew)}
        ready = wait([*ends, *(process.sentinel for process, _ in self._crew)])
        for end in ready:
            if isinstance(end, Connection):
                with contextlib.suppress(OSError, EOFError):
                    return ends[end], end.recv()
        dead = next(
            i for i, (process, connection) in enumerate(self._crew) if {process.sentinel, connection} & set(ready)
        )
        self._end(dead)
        self._crew[dead] = self._start(dead)
        return dead, None

    def close(self) -> None:
        for i in range(len(self._crew)):
            self._end(i)
        self._crew.clear()

    def _start(self, index: int) -> tuple[BaseProcess, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(there, self._setup, index), daemon=True, name=f"hetero_fl worker {index}"
        )
        process.start()
        there.close()
        return process, here

    def _end(self, index: int) -> None:
        process, connection = self._crew[index]
        connection.close()
        process.terminate()
        process.join()


def work(connection: Connection, setup: Setup, index: int) -> None:
    """A worker's life: jobs until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the run ends its workers itself
    worker = Worker(setup, index)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(worker.do(connection.recv()))
