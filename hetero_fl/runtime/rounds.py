"""The synchronous round: broadcast, train, channel, aggregate; and the readings after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Direct, Messages, Traffic, hold_round
from hetero_fl.errors import RunFailed
from hetero_fl.metrics import score, spread
from hetero_fl.payload import Payload, PayloadError, check_upload, loss_of
from hetero_fl.plan import Predict, Rows
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast, told
from hetero_fl.runtime.serial import Performer, carry_out
from hetero_fl.runtime.site import Reading, Scores, Site
from hetero_fl.runtime.store import Store
from hetero_fl.runtime.training import Diverged
from hetero_fl.seeding import generator
from hetero_fl.state import in_order

Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass
class Readings:
    """An evaluation: each client's reading, and the server's scores on the common sets if it has a model."""

    clients: dict[str, Reading]
    server: dict[str, Scores] | None


def draw_cohort(federation: Federation, per_round: int | None, round: int) -> list[str]:
    """Everyone, or `per_round` clients drawn by the key of that round, in id order."""
    ids = in_order(federation.cards)
    if per_round is None or per_round >= len(ids):
        return ids
    drawn = torch.randperm(len(ids), generator=generator(federation.seed, round, "cohort"))
    return [ids[i] for i in sorted(drawn[:per_round].tolist())]


class Rounds:
    """A run in progress. Its state is the server, the store and the traffic; everything else follows from the configuration."""

    def __init__(
        self,
        algorithm: Algorithm,
        federation: Federation,
        performer: Performer,
        per_round: int | None = None,
        stop_on_divergence: bool = False,
        watch: Callable[[str], None] | None = None,
    ) -> None:
        self.algorithm, self.federation, self.performer = algorithm, federation, performer
        self.per_round, self.stop_on_divergence = per_round, stop_on_divergence
        self.store, self.protocol, self.traffic = Store(), Direct(), Traffic()
        self.site = Site(algorithm, federation, self.store, performer, self.protocol)
        self.site.watch = watch
        self.expectations = Expectations(algorithm, federation)
        self.server = federation.server()
        self.completed = 0
        with told():
            algorithm.start(self.server)

    # A round -----------------------------------------------------------------------------------------------------
    def cohort(self, round: int) -> list[str]:
        """Who takes part in that round: everyone, or `per_round` of them drawn by the key, in id order."""
        return draw_cohort(self.federation, self.per_round, round)

    @told()
    def round(self) -> Record:
        """Hold the next round and commit it. Raises RunFailed if clients trained and no upload could be used, or if a
        method of the user's own fails."""
        begun, index = time.perf_counter(), self.completed
        cohort, failed = self.cohort(index), {}
        losses: dict[str, float] = {}
        before = (self.traffic.up, self.traffic.down)
        self._clock(index)
        sent = {c: broadcast(self.algorithm, self.server, self.federation.cards[c]) for c in cohort}

        def exchange(requests: Messages) -> Messages:
            replies = {}
            for client in in_order(requests):
                try:
                    replies[client] = self.site.answer(client, requests[client], index)
                except Diverged as error:
                    failed[client] = str(error)
                    if self.stop_on_divergence:
                        raise RunFailed(f"round {index + 1}: {client} diverged: {error}") from None
            return replies

        traffic = self.traffic if self.algorithm.counted else Traffic()
        arrived = hold_round(self.protocol, {c: p.encode() for c, p in sent.items()}, exchange, traffic)
        uploads = []
        for client in in_order(arrived):
            try:
                payload = self.receive(client, arrived[client], sent[client], index)
            except PayloadError as error:
                failed[client] = f"upload refused: {error}"
                self.store.drop(client)
                continue
            uploads.append(Upload(self.federation.cards[client], payload))
            if (loss := loss_of(payload.report)) is not None:
                losses[client] = loss
        if not uploads:
            self.store.discard()
            raise RunFailed(
                f"round {index + 1}: no usable upload from {len(cohort)} clients; {next(iter(failed.items()), '')}"
            )
        try:
            aggregate = self.algorithm.aggregate(self.server, Uploads(uploads, self.algorithm.uploads))
            carry_out(aggregate, self.server, self.performer)
        except Diverged as error:
            raise RunFailed(f"round {index + 1}: training at the server diverged: {error}") from None
        self.store.commit()
        self.completed += 1
        return {
            "round": self.completed,
            "cohort": cohort,
            "failed": failed,
            "train_loss": losses,
            "up_bytes": self.traffic.up - before[0],
            "down_bytes": self.traffic.down - before[1],
            "seconds": {"training": time.perf_counter() - begun, "evaluation": 0.0},
        }

    def receive(self, client: str, data: bytes, broadcast: Payload, round: int) -> Payload:
        """An upload, decoded and checked against what this client was to send. Raises PayloadError."""
        payload = Payload.decode(data)
        expected = self.expectations.of(self.federation.cards[client], broadcast, round)
        check_upload(payload, self.algorithm.uploads, expected)
        return payload

    def _clock(self, round: int) -> None:
        self.server.clock, self.server.uses = self.federation.clock(round), {}

    # Evaluation --------------------------------------------------------------------------------------------------
    def broadcast_for_reading(self, client: str) -> bytes:
        """What the client would receive next, to be read and not to be trained on. Counted like any other transfer."""
        self._clock(self.completed)
        card = replace(self.federation.cards[client], reading=True)
        body = broadcast(self.algorithm, self.server, card).encode()
        if self.algorithm.counted:
            self.traffic.down += len(body)
        return body

    @told()
    def evaluate(self, details: bool = False) -> Readings:
        """Read every client's model, sampled or not, as it would be used now; and the server's own."""
        clients = {}
        for client in in_order(self.federation.cards):
            body = self.broadcast_for_reading(client)
            try:
                clients[client] = self.site.read(client, body, self.completed, details)
            except (Diverged, PayloadError) as error:
                raise RunFailed(f"round {self.completed}: {client} cannot be evaluated: {error}") from None
        return Readings(clients, self._read_server())

    def _read_server(self) -> dict[str, Scores] | None:
        slot = self.algorithm.server_slot(self.server)
        if slot is None:
            return None
        view = self.federation.view_of(slot)
        scores = {}
        for name, rows in (("global", "common_test"), ("validation_global", "common_validation")):
            y = self.server.data(rows, view)["y"]
            if len(y):
                logits = self.performer.perform(self.server, Predict(slot, Rows(rows, through=view)))
                scores[name] = score(self.federation.task, logits, y)
        return scores

    # Crash safety ------------------------------------------------------------------------------------------------
    def tree(self) -> dict[str, Any]:
        """Everything that a later process needs to go on as if nothing had happened."""
        return {
            "completed": self.completed,
            "server": {"models": self.server.models, "state": self.server.state},
            "clients": self.store.tree(),
            "traffic": {"up": self.traffic.up, "down": self.traffic.down},
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """The reverse of `tree`."""
        self.completed = tree["completed"]
        self.server.models, self.server.state = tree["server"]["models"], tree["server"]["state"]
        self.store.restore(tree["clients"])
        self.traffic = Traffic(**tree["traffic"])


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
    record["clients"] = {
        c: {name: r.scores[name] for name in ("personal", "global") if name in r.scores}
        for c, r in readings.clients.items()
    }
