"""What travels between a run and its workers: whole tasks of clients, and their results. Never code, never live objects.

A worker makes the plans itself, from the method's settings and the federation that it was given once.
"""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Message
from hetero_fl.errors import RunFailed, UserError
from hetero_fl.payload import PayloadError
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import LONGEST, told
from hetero_fl.runtime.performers import make_performer
from hetero_fl.runtime.plans import Diverged
from hetero_fl.runtime.secure import make_protocol
from hetero_fl.runtime.site import Reading, Site
from hetero_fl.runtime.store import Store

HELD = 256 * 2**20  # bytes of private state that a worker keeps for the next time


@dataclass(frozen=True)
class Setup:
    """What a worker needs once."""

    algorithm: Algorithm
    federation: Federation
    threads: int
    devices: tuple[str, ...]  # workers take them in turn
    chunk: int = 1
    precision: str = "float32"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Job:
    """Tasks of some clients, chunk by chunk. `private` has the state of those whose worker does not hold it already, `notes`
    what they remember of the round's earlier exchanges."""

    number: int
    kind: Literal["answer", "read"]
    chunks: list[list[str]]
    requests: dict[str, Message]
    private: dict[str, bytes | None]
    details: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)

    @property
    def clients(self) -> list[str]:
        """All of them."""
        return [client for chunk in self.chunks for client in chunk]


@dataclass
class Done:
    """What came of a job. `error` ends the run."""

    job: int
    replies: dict[str, Message | Diverged] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)  # as staged
    notes: dict[str, bytes] = field(default_factory=dict)  # of all its clients that have any now
    seconds: dict[str, float] = field(default_factory=dict)  # of each client's chunk, shared out
    forgot: list[str] = field(default_factory=list)  # clients whose state this worker no longer holds
    error: Exception | None = None
    trace: str = ""  # where it was raised

    def sealed(self) -> Done:
        """With the checksums of its messages: as it leaves a worker that may be on another machine."""
        replies = {c: r.sealed() if isinstance(r, Message) else r for c, r in self.replies.items()}
        return replace(self, replies=replies)


class Worker:
    """Does jobs, one after the other, in a process of its own or anywhere else."""

    def __init__(self, setup: Setup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup, self.index, self.store = setup, index, Store()
        self._used: OrderedDict[str, None] = OrderedDict()  # clients whose state is held, the last used at the end

    @cached_property
    def site(self) -> Site:
        """Made with the first job, so that what goes wrong comes back with its results."""
        device = torch.device(self.setup.devices[self.index % len(self.setup.devices)])
        performer = make_performer(device, self.setup.chunk, self.setup.precision)
        algorithm, federation = self.setup.algorithm, self.setup.federation
        return Site(algorithm, federation, self.store, performer, make_protocol(algorithm, federation))

    def do(self, job: Job) -> Done:
        """The job's results; an exception that is not a client's own divergence is among them, not raised."""
        done = Done(job.number)
        try:
            for chunk in job.chunks:
                begun = time.perf_counter()
                self._chunk(job, chunk, done)
                done.seconds.update(dict.fromkeys(chunk, (time.perf_counter() - begun) / len(chunk)))
        except (UserError, RunFailed, Diverged, PayloadError) as error:
            known = type(error) in (UserError, RunFailed, Diverged, PayloadError)  # a user's own might not travel
            done.error, done.trace = (error if known else RunFailed(str(error))), traceback.format_exc()
        except Exception as error:
            done.error = RunFailed(f"a worker failed: {type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}")
            done.trace = traceback.format_exc()
        done.forgot = self._make_room(job.clients)
        return done

    @told()
    def _chunk(self, job: Job, chunk: list[str], done: Done) -> None:
        for client in chunk:
            if client in job.private:
                self.store.stage(client, job.private[client] or b"")
        self.store.commit()
        if job.kind == "read":
            bodies, (round,) = {c: job.requests[c].body for c in chunk}, {job.requests[c].round for c in chunk}
            done.readings.update(self.site.read(bodies, round, job.details))
            return
        before = {c: self.store.stamp(c) for c in chunk}
        self.store.notes.update({c: job.notes[c] for c in chunk if c in job.notes})
        done.replies.update(self.site.answer({c: job.requests[c] for c in chunk}))
        done.notes.update(self.store.notes)
        self.store.commit()
        for client in chunk:
            if self.store.stamp(client) != before[client]:
                done.private[client] = self.store.encoded(client) or b""

    def _make_room(self, clients: list[str]) -> list[str]:
        """Forget the state of those who were not seen for longest, beyond the bound."""
        for client in clients:
            self._used.pop(client, None)
            if self.store.stamp(client) is not None:
                self._used[client] = None
        forgot = []
        while self.store.held > HELD and self._used:
            forgot.append(self._used.popitem(last=False)[0])
            self.store.stage(forgot[-1], b"")
            self.store.commit()
        return forgot


class Remote(Exception):
    """A traceback from another process: the cause of what is raised here. (Exceptions do not carry theirs across.)"""
