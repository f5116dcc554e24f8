"""Asynchronous running: clients train at their own pace, and the server aggregates when enough uploads have come.

An event queue in simulated time (FedAsync: Xie et al. 2019; FedBuff: Nguyen et al. 2022). A client is given a task with the
newest broadcast and ends when its device says so; then its upload enters the buffer, weighted by how many versions the server
has made meanwhile, and its place goes to an idle client. What befalls a task is known when it is given out, so those in flight
are computed together, when the first of them is needed: when that is changes no bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.staleness import discounted
from hetero_fl.channel.alike import Alike
from hetero_fl.channel.protocol import Message
from hetero_fl.codec import as_bytes, as_tensor
from hetero_fl.config.staleness import StalenessConfig
from hetero_fl.errors import RunFailed
from hetero_fl.order import natural
from hetero_fl.payload import Payload, PayloadError
from hetero_fl.runtime.deliveries import befallen
from hetero_fl.runtime.faults import Fate
from hetero_fl.runtime.plans import Diverged, carry_out
from hetero_fl.runtime.queue import Queue, Task
from hetero_fl.runtime.readings import Record
from hetero_fl.runtime.rounds import CHANGED
from hetero_fl.runtime.session import Session
from hetero_fl.runtime.tally import Tally
from hetero_fl.seeding import sample

PATIENCE = 100  # tasks in a row for each place that may come to nothing by fate, before the run ends


class Nothing(Exception):
    """Why nothing came of a task: by `fate`, or by the `client`, which would do the same again."""

    def __init__(self, why: str, cause: str) -> None:
        super().__init__(why)
        self.cause = cause


class Asynchronous(Session):
    """A run without rounds; what is called one is a cohort's worth of uploads taken.

    Args:
        per_round: clients in flight at any time (None: all).
        buffer: uploads after which the server aggregates, where the method does not say it; None: a cohort's worth.
        staleness: what an upload is worth, where the method does not say it.
    """

    def __init__(
        self, *args: Any, buffer: int | None = None, staleness: StalenessConfig | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.ids = self.federation.cards.clients.ids
        self.places = min(self.per_round or len(self.ids), len(self.ids))
        self.goal = self.algorithm.goal or buffer or self.places
        self.staleness = self.algorithm.discount or staleness or StalenessConfig()
        self.queue = Queue()
        self.version, self.given = 0, 0  # aggregations, tasks
        self._buffer: list[tuple[str, Payload, float]] = []  # what came from whom, and what staleness leaves of it
        self._asked: Counter[str] = Counter()  # tasks of this version by client
        self._fillings = 0  # of places, in this version
        self._barren: Counter[str] = Counter()  # tasks that came to nothing since the last upload was taken
        self._given_up = ""  # why the newest aggregation of this round came to nothing
        self._encoded = self._encoder()

    @property
    def turn(self) -> int:
        return self.version

    # Events ------------------------------------------------------------------------------------------------------
    def _hold(self) -> Record:
        begun, tally = time.perf_counter(), Tally(self.now)
        before = (self.traffic.up, self.traffic.down)
        while len(tally.cohort) < self.places:
            task = self._next()
            self.now = task.ends
            self._end(task, tally)
        self._may_be_killed()
        self.completed += 1
        given_up, self._given_up = self._given_up, ""
        return {
            "round": self.completed,
            **tally.record(self.now, self.version, "simulated" if self.apart is None else "wall"),
            "up_bytes": self.traffic.up - before[0],
            "down_bytes": self.traffic.down - before[1],
            "seconds": {"training": time.perf_counter() - begun, "evaluation": 0.0},
            **({"diverged": given_up} if given_up else {}),
        }

    def _next(self) -> Task:
        """The next task to end; vacant places are filled before."""
        if not len(self.queue) or self.queue.due > self.now:  # whatever ends together has ended
            self._fill()
        if not self.queue.first.computed:
            self._compute()
        return self.queue.pop()

    def _idle(self) -> tuple[int, Callable[[int], int]]:
        """How many clients can be given a task, and what place each of them in turn has among all."""
        return len(self.ids) - len(self.queue), self.queue.idle

    def _fill(self) -> None:
        """Give every vacant place to an idle client, all of them drawn together: who is alone in being idle is drawn."""
        idle, place_of = self._idle()
        vacant = min(self.places - len(self.queue), idle)
        if not vacant:
            return
        self._clock(self.version)
        anew = (self._fillings,) if self._fillings else ()  # the first is drawn as a synchronous cohort is
        ranks = sample(idle, vacant, self.federation.seed, self.version, "cohort", *anew)
        self._fillings += 1
        for place in [place_of(rank) for rank in ranks]:
            self.queue.push(self._task(self.ids[place], place))

    def _task(self, client: str, place: int) -> Task:
        """A client's next task, its fate and its time known."""
        number, again, card = self.given, self._asked[client], self.federation.cards[client]
        self.given, self._asked[client] = number + 1, again + 1
        payload = self._broadcast(card)
        body, fate = self._encoded(payload), self.conditions.faults.fate(client, number)
        up = self.upload_bytes(card, payload, self.version)
        self._count(client, down=len(body))
        ends = self._due(client, len(body), up, number, fate)
        return Task(number, client, place, self.version, again, self.now, ends, body, up, fate)

    def _due(self, client: str, down: int, up: int, number: int, fate: Fate) -> float:
        """When a task that is given out now will end."""
        stages = self.conditions.timing.stages(client, down, up, self.now, number)
        return {
            "before": stages.received,
            "during": stages.received + fate.share * (stages.trained - stages.received),
            "after": stages.trained,
        }.get(fate.what, stages.arrived + fate.by)

    def _compute(self) -> None:
        """Whatever is in flight and will have an effect, together."""
        tasks = {task.client: task for task in self.queue.take_open()}
        requests = {client: task.request for client, task in tasks.items()}
        for client, reply in self.executor.answer(requests):
            if isinstance(reply, Diverged):
                tasks[client].diverged = str(reply)
            else:
                tasks[client].upload = reply

    def _end(self, task: Task, tally: Tally) -> None:
        """A task ends. Its upload enters the buffer, and what its client keeps is settled; or nothing comes of it. Raises
        RunFailed if that is all that ever happens."""
        try:
            payload = self._arrival(task)
        except Nothing as nothing:
            self.store.drop(task.client)
            tally.lost(task, str(nothing))
            self._barren[nothing.cause] += 1
            if self._barren["client"] >= self.places or self._barren["fate"] >= PATIENCE * self.places:
                tasks = sum(self._barren.values())
                raise RunFailed(
                    f"round {self.completed + 1}: no usable upload from {tasks} tasks; {task.client}: {nothing}"
                ) from None
            return
        versions = self.version - task.version
        self.store.commit([task.client])
        self._barren.clear()
        tally.took(task, payload, versions)
        self._buffer.append((task.client, payload, self.staleness.weight(versions)))
        if len(self._buffer) >= self.goal:
            self._aggregate()

    def _arrival(self, task: Task) -> Payload:
        """The task's upload as it arrives, if it is what was sent and what was asked for. Raises Nothing."""
        if task.fate.fails:
            self._count(task.client, up=task.up_bytes if task.fate.what == "lost" else 0)
            raise Nothing(task.fate.why, "fate")
        if task.diverged is not None:
            if self.stop_on_divergence:
                raise RunFailed(f"round {self.completed + 1}: {task.client} diverged: {task.diverged}")
            raise Nothing(task.diverged, "client")
        sent = iter([(task.client, task.upload or Message("upload", b""))])
        came = list(befallen(sent, {task.client: task.fate}, self.federation.seed, "changed", task.number))
        arrivals = [message for _, message in came if isinstance(message, Message)]
        self._count(task.client, up=sum(len(message.body) for message in arrivals))
        upload = arrivals[0]  # the same once more is known by the task's number, and dropped
        if not upload.intact:
            raise Nothing(CHANGED, "fate")
        asked = self.links.received(task.version, task.broadcast)
        try:
            return self.intake.receive(task.client, upload.body, lambda card: asked, task.version, task.again)
        except PayloadError as error:
            raise Nothing(f"upload refused: {error}", "client") from None

    def _aggregate(self) -> None:
        """The buffer becomes the next version."""
        self._clock(self.version)
        cards, came = self.federation.cards, sorted(self._buffer, key=lambda entry: natural(entry[0]))
        sent = [Upload(cards[c], discounted(payload, worth), worth) for c, payload, worth in came]
        given_up = self._tried(lambda: self._combine(sent), {c: payload.magnitude for c, payload, _ in came})
        self._buffer.clear()
        if given_up:  # the version stays, and what clients keep, which they may have built on
            self._given_up = given_up
            return
        self._asked.clear()
        self._fillings = 0
        self.version += 1
        self._encoded = self._encoder()

    def _combine(self, sent: list[Upload]) -> None:
        uploads = Uploads(specs=self.algorithm.uploads, common=self.federation.common)
        for upload in sent:
            uploads.add(upload)
        carry_out(self.algorithm.aggregate(self.server, uploads), self.server, self.performer)

    def _encoder(self) -> Alike[bytes]:
        """Of this version's broadcasts, whose random draws are keyed by it."""
        archs = self.server.arch.values()
        return Alike(lambda payload: self.links.broadcast(self.version, payload, archs))

    def _count(self, client: str, up: int = 0, down: int = 0) -> None:
        """Bytes that a client sends or receives."""
        if self.algorithm.counted:
            self.traffic.up += up
            self.traffic.down += down

    # Crash safety ------------------------------------------------------------------------------------------------
    def tree(self) -> dict[str, Any]:
        return super().tree() | {
            "now": self.now,
            "count": [self.version, self.given, self._fillings],
            "asked": dict(self._asked),
            "barren": dict(self._barren),
            "buffer": [[client, as_tensor(payload.encode()), worth] for client, payload, worth in self._buffer],
            "queue": self.queue.tree(),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        super().restore(tree)
        self.version, self.given, self._fillings = tree["count"]
        self._encoded = self._encoder()
        self._asked, self._barren = Counter(tree["asked"]), Counter(tree["barren"])
        self._buffer = [(client, Payload.decode(as_bytes(body)), worth) for client, body, worth in tree["buffer"]]
        self.queue = Queue.of(tree["queue"], self.conditions.faults.fate)
