"""A run in progress: the server, the clients' state, traffic and evaluation."""

from __future__ import annotations

import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from hetero_fl.algorithms import Algorithm
from hetero_fl.communication.protocol import Alike, Message, Traffic
from hetero_fl.core.metrics import Scores, score, spread
from hetero_fl.core.participant import Card, contained, copied
from hetero_fl.core.payload import Item, Payload, PayloadError, report_of
from hetero_fl.core.plan import Predict, Rows
from hetero_fl.engine.driver import Diverged
from hetero_fl.federation.channel import Links, make_protocol
from hetero_fl.federation.client_runtime import Reading
from hetero_fl.federation.dry_run import Expectations
from hetero_fl.federation.executors.base import Absent, Apart, Executor, in_turn
from hetero_fl.federation.federation import Federation
from hetero_fl.federation.method_calls import broadcast, is_own, told
from hetero_fl.federation.simulation.schedule import Conditions
from hetero_fl.federation.upload_collector import Intake
from hetero_fl.privacy.server import PrivateSums
from hetero_fl.utils.caching import Lazy
from hetero_fl.utils.errors import RunFailed
from hetero_fl.utils.ordering import in_order

# An evaluation's figures, and how they stand in a round's record.

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass
class Readings:
    """An evaluation: each client's reading, the server's scores on the common sets if it has a model, and why clients on machines
    of their own could not be read, whose scores are in no mean."""

    clients: dict[str, Reading]
    server: dict[str, Scores] | None
    absent: dict[str, str] = field(default_factory=dict)


def record_readings(record: Record, readings: Readings) -> None:
    """Set an evaluation's figures into a round's record."""
    by_name = {
        name: spread({c: r.scores[name] for c, r in readings.clients.items() if name in r.scores})
        for name in ("personal", "global", "validation_personal", "validation_global")
        if any(name in r.scores for r in readings.clients.values())
    }
    server = readings.server or {}
    record["personal"], record["global"] = by_name.get("personal"), by_name.get("global")
    record["server"] = server.get("global")
    record["validation"] = {
        "personal": by_name.get("validation_personal"),
        "global": by_name.get("validation_global"),
        "server": server.get("validation_global"),
    }
    stamped = [r.triggered for r in readings.clients.values() if r.triggered is not None]
    if stamped:
        record["attacks"]["success"] = sum(stamped) / len(stamped)
    record["clients"] = {
        c: {name: r.scores[name] for name in ("personal", "global") if name in r.scores}
        for c, r in readings.clients.items()
    }
    if readings.absent:
        record["unread"] = readings.absent


# A run in progress, whatever decides who is asked and when: its server, its clients' state, its
# traffic, its readings.

MOST_DIVERGED = 3  # rounds in succession in which training at the server may diverge


class Session(ABC):
    """A run in progress. Its state is the server, the store and the traffic; everything else follows from the configuration."""

    def __init__(
        self,
        algorithm: Algorithm,
        federation: Federation,
        executor: Executor,
        per_round: int | None = None,
        stop_on_divergence: bool = False,
        conditions: Conditions | None = None,
    ) -> None:
        self.algorithm, self.federation, self.executor = algorithm, federation, executor
        self.per_round, self.stop_on_divergence = per_round, stop_on_divergence
        self.conditions = conditions or Conditions.ideal(federation, per_round)
        self.now = (
            # seconds since the run began: simulated ones, or real ones where clients are on
            # machines of their own
            0.0
        )
        self.resumed: int | None = None  # the round after which this process took the run over
        self.store, self.performer = executor.store, executor.performer
        self.protocol, self.traffic = make_protocol(algorithm, federation), Traffic()
        self.expectations = Expectations(algorithm, federation)
        self.links, self.bounds = (
            Links(algorithm, federation),
            Links(algorithm, federation, bound=True),
        )
        self.sums = PrivateSums(self.expectations, per_round)
        self.intake = Intake(self.expectations, self.links, self.protocol, self.sums)
        self.server = federation.server()
        self.completed = 0
        # rounds in succession that were given up because training at the server diverged
        self.diverged = 0
        # of uploads, by the example that they follow
        self._lengths: dict[int, tuple[Mapping[str, Item], int]] = {}
        self._before = time.monotonic()  # the moment from which real seconds are counted
        with told():
            algorithm.start(self.server)

    @property
    def apart(self) -> Apart | None:
        """The executor, if clients are on machines of their own."""
        return cast(Apart, self.executor) if self.conditions.here is not None else None

    def real(self) -> float:
        """Seconds since the run began, those between a crash and a resume left out."""
        return time.monotonic() - self._before

    def saved(self) -> None:
        """A checkpoint has been written, or read."""
        if self.apart is not None:
            self.apart.saved()

    @told()
    def round(self) -> Record:
        """Hold the next round and commit it. Raises RunFailed if clients trained and no upload could be used, or if a
        method of the user's own fails; nothing that clients did in it is kept then."""
        before, now = replace(self.traffic), self.now
        try:
            return self._hold()
        except BaseException:
            self.store.discard()
            self.traffic.up, self.traffic.down, self.now = before.up, before.down, now
            raise

    def _may_be_killed(self) -> None:
        """As `faults.server` has it, before the round is committed; the process that takes the run over there goes on."""
        if (
            self.completed + 1 in self.conditions.faults.config.server
            and self.resumed != self.completed
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    @property
    def turn(self) -> int:
        """The round that comes next, from 0: what the server sends and draws is keyed by it."""
        return self.completed

    @abstractmethod
    def _hold(self) -> Record:
        """The next round: whom to ask, what to make of the answers, and its line of `metrics.jsonl`."""

    # What the server makes of uploads --------------------------------------------------------------------------------------
    def _tried(self, aggregate: Callable[[], None], magnitudes: Mapping[str, float]) -> str:
        """Change the server by `aggregate`; if its training diverges, set it back to what it was and return why.

        Args:
            aggregate: Changes the server, the memory of rules and the bounds of private sums.
            magnitudes: Of each upload, by client.

        Raises:
            RunFailed: If this has happened `MOST_DIVERGED` times in succession, or in every round of a shorter run, or if
                `runtime.divergence` is `stop`.
        """
        # only methods of this package replace all tensors
        keep = copied if is_own(self.algorithm) else contained
        models, state = keep(self.server.models), keep(self.server.state)
        arch, memory, sums = dict(self.server.arch), contained(self.intake.memory), self.sums.tree()
        try:
            aggregate()
        except Diverged as error:
            self.server.models, self.server.state, self.server.arch = models, state, arch
            self.intake.memory = memory
            self.sums.restore(sums)
            self.diverged += 1
            why = f"training at the server diverged: {error}"
            if magnitudes and self.sums.privacy is None:
                client = max(magnitudes, key=lambda c: magnitudes[c])
                why += (
                    f"; the upload of {client} has the largest magnitude, {magnitudes[client]:.3g}"
                )
            most = min(MOST_DIVERGED, self.federation.rounds)
            if self.diverged >= most or self.stop_on_divergence:
                times = f", {self.diverged} times in succession" if self.diverged > 1 else ""
                raise RunFailed(f"round {self.completed + 1}: {why}{times}") from None
            return why
        self.diverged = 0
        return ""

    # What clients receive -----------------------------------------------------------------------------------------------
    def broadcasts(self, clients: Collection[str], reading: bool = False) -> Mapping[str, bytes]:
        """What the server sends to each, encoded when it is asked for; `reading`: to be read, not to be trained on."""
        encoded = Alike(
            lambda payload: self.links.broadcast(
                self.server.clock.round, payload, self.server.arch.values()
            )
        )

        def make(client: str) -> bytes:
            card = self.federation.cards[client]
            return encoded(self._broadcast(replace(card, reading=True) if reading else card))

        return Lazy(clients, make)

    def heard(self, round: int) -> Callable[[Card], Payload]:
        """What each client makes of what it was sent in that round."""
        heard = Alike(lambda payload: self.links.heard(round, payload, self.server.arch.values()))
        return lambda card: heard(self._broadcast(card))

    def _broadcast(self, card: Card) -> Payload:
        """May be made several times, in any order: what it draws is keyed by the client, not by the turn."""
        speaker = replace(self.server, id=f"{self.server.id} to {card.id}", uses={})
        return self.sums.announce(broadcast(self.algorithm, speaker, card))

    def upload_bytes(self, card: Card, broadcast: Payload, round: int) -> int:
        """Bytes of the upload that a client will make of this broadcast, its report included (but for the digits of a weight)."""
        like = self.expectations.of(card, broadcast, round)
        known = self._lengths.get(id(like))
        if known is None or known[0] is not like:
            length = len(
                self.bounds.upload(card, round, Payload(dict(like), report_of(0.0)), broadcast, {})
            )
            known = self._lengths[id(like)] = (like, length)
        return known[1]

    def _clock(self, round: int) -> None:
        self.server.clock, self.server.uses = self.federation.clock(round), {}

    @told()
    def ask(self, client: str, round: int) -> tuple[Payload, Payload]:
        """What one client receives in a round, and what arrives of its answer if the server sees it by itself; nothing is kept.

        Raises RunFailed if the client diverges, PayloadError if the answer is not what was asked for.
        """
        self._clock(round)
        bodies = dict(self.broadcasts([client]))
        try:
            ((_, reply),) = self.executor.answer({client: Message("train", bodies[client], round)})
        finally:
            self.store.discard()
        if isinstance(reply, Diverged):
            raise RunFailed(f"round {round + 1}: {client} diverged: {reply}")
        got = self.links.received(round, bodies[client])
        return got, self.intake.receive(client, reply.body, self.heard(round), round)

    # Evaluation --------------------------------------------------------------------------------------------------
    @told()
    def evaluate(
        self, details: bool = False, save: Callable[[str, bytes], None] | None = None
    ) -> Readings:
        """Read the models of the federation's readers, in this cohort or not, as they would be used now; and the server's.

        What they receive for it is what they would receive next, and is counted like any other transfer. `details`: all
        that a report shows; each model (see `SavedModel.encode`) is then handed to `save` as it comes, and not kept.
        """
        self._clock(self.turn)
        ids = in_order(self.federation.readers)
        bodies = self.broadcasts(ids, reading=True)

        def counted(client: str) -> bytes:
            body = bodies[client]
            sizes[client] = len(body)
            return body

        sizes: dict[str, int] = {}
        clients: dict[str, Reading] = {}
        absent: dict[str, str] = {}
        try:
            for id, reading in in_turn(
                ids, self.executor.read(Lazy(ids, counted), self.turn, details)
            ):
                if isinstance(reading, Absent):
                    absent[id] = str(reading)
                    continue
                if save is not None:
                    save(id, reading.model)
                    reading.model = b""
                clients[id] = reading
        except (Diverged, PayloadError) as error:
            raise RunFailed(
                f"round {self.completed}: a model cannot be evaluated: {error}"
            ) from None
        if self.algorithm.counted:
            self.traffic.down += sum(sizes.values())
        return Readings(clients, self._read_server(), absent)

    def _read_server(self) -> dict[str, Scores] | None:
        slot = self.algorithm.server_slot(self.server)
        if slot is None:
            return None
        view = self.federation.view_of(slot)
        scores = {}
        for name, rows in (("global", "common_test"), ("validation_global", "common_validation")):
            y = self.server.data(rows, view)["y"]
            if len(y):
                (logits,) = self.performer.perform(
                    [(self.server, Predict(slot, Rows(rows, through=view)))]
                )
                unit = self.federation.data.beside(self.server.id, rows).unit
                scores[name] = score(self.federation.task, logits, y, unit)
        return scores

    # Crash safety ------------------------------------------------------------------------------------------------
    def tree(self) -> dict[str, Any]:
        """With the store, everything that a later process needs to go on as if nothing had happened."""
        return {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
            "aggregation": self.intake.memory,
            "bounds": self.sums.tree(),
            **({"diverged": self.diverged} if self.diverged else {}),
            **({"now": self.now} if self.conditions.simulated or self.apart is not None else {}),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """The reverse of `tree`."""
        self.completed = self.resumed = tree["completed"]
        self.now = tree.get("now", 0.0)
        self.diverged = tree.get("diverged", 0)
        self._before = time.monotonic() - self.now
        self.server.models, self.server.state = tree["server"]["models"], tree["server"]["state"]
        self.traffic = Traffic(**tree["traffic"])
        self.intake.memory = tree["aggregation"]
        self.sums.restore(tree["bounds"])
