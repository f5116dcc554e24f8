"""The synchronous round: broadcast, train, channel, aggregate; and the readings after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.channel.protocol import Direct, Message, Messages, Replies, Traffic, hold_round
from hetero_fl.errors import RunFailed
from hetero_fl.lazy import Lazy
from hetero_fl.metrics import score
from hetero_fl.payload import Encoded, Payload, PayloadError
from hetero_fl.plan import Predict, Rows
from hetero_fl.runtime.dry import Expectations
from hetero_fl.runtime.executor import Executor, Reply, in_turn
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.hooks import broadcast, told
from hetero_fl.runtime.intake import Intake
from hetero_fl.runtime.plans import Diverged, carry_out
from hetero_fl.runtime.private_sums import PrivateSums
from hetero_fl.runtime.readings import Readings, Record
from hetero_fl.runtime.site import Reading, Scores
from hetero_fl.seeding import sample
from hetero_fl.state import Card, in_order


def draw_cohort(federation: Federation, per_round: int | None, round: int) -> list[str]:
    """Everyone, or `per_round` clients drawn by the key of that round, in id order; as many on average where each takes part
    by a draw of its own (`privacy.poisson_cohorts`)."""
    ids = federation.cards.clients.ids
    if per_round is not None and federation.privacy is not None and federation.privacy.poisson_cohorts:
        draws = federation.noise.generator(round, "cohort")
        taken = torch.rand(len(ids), generator=draws, dtype=torch.float64) < per_round / len(ids)
        return [ids[i] for i in taken.nonzero().squeeze(1).tolist()]
    if per_round is None or per_round >= len(ids):
        return list(ids)
    return [ids[i] for i in sample(len(ids), per_round, federation.seed, round, "cohort")]


class Rounds:
    """A run in progress. Its state is the server, the store and the traffic; everything else follows from the configuration."""

    def __init__(
        self,
        algorithm: Algorithm,
        federation: Federation,
        executor: Executor,
        per_round: int | None = None,
        stop_on_divergence: bool = False,
    ) -> None:
        self.algorithm, self.federation, self.executor = algorithm, federation, executor
        self.per_round, self.stop_on_divergence = per_round, stop_on_divergence
        self.store, self.performer = executor.store, executor.performer
        self.protocol, self.traffic = Direct(), Traffic()
        self.expectations = Expectations(algorithm, federation)
        self.sums = PrivateSums(self.expectations, per_round)
        self.intake = Intake(self.expectations, self.sums)
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
        method of the user's own fails; nothing that clients did in it is kept then."""
        before = replace(self.traffic)
        try:
            return self._hold()
        except BaseException:
            self.store.discard()
            self.traffic.up, self.traffic.down = before.up, before.down
            raise

    def _hold(self) -> Record:
        begun, index = time.perf_counter(), self.completed
        cohort, failed = self.cohort(index), {}
        before = (self.traffic.up, self.traffic.down)
        self._clock(index)

        def usable(arrival: tuple[str, Reply]) -> TypeGuard[tuple[str, Message]]:
            client, reply = arrival
            if not isinstance(reply, Diverged):
                return True
            failed[client] = str(reply)
            if self.stop_on_divergence:
                raise RunFailed(f"round {index + 1}: {client} diverged: {reply}")
            return False

        def exchange(requests: Messages) -> Replies:
            return filter(usable, in_turn(list(requests), self.executor.answer(requests, index)))

        traffic = self.traffic if self.algorithm.counted else Traffic()
        arrivals = hold_round(self.protocol, self.broadcasts(cohort), exchange, traffic)
        taken = self.intake.take(arrivals, self._broadcast, index)
        for client, why in taken.refused.items():
            failed[client] = f"upload refused: {why}"
            self.store.drop(client)
        if cohort and not taken.uploads:
            raise RunFailed(
                f"round {index + 1}: no usable upload from {len(cohort)} clients; {next(iter(failed.items()), '')}"
            )
        try:
            carry_out(self.algorithm.aggregate(self.server, taken.uploads), self.server, self.performer)
        except Diverged as error:
            raise RunFailed(f"round {index + 1}: training at the server diverged: {error}") from None
        self.sums.adapt(taken.uploads)
        self.store.commit()
        self.completed += 1
        return {
            "round": self.completed,
            "cohort": cohort,
            "failed": failed,
            "train_loss": taken.losses,
            "up_bytes": self.traffic.up - before[0],
            "down_bytes": self.traffic.down - before[1],
            "seconds": {"training": time.perf_counter() - begun, "evaluation": 0.0},
        }

    def broadcasts(self, clients: Collection[str], reading: bool = False) -> Mapping[str, bytes]:
        """What the server sends to each, encoded when it is asked for; `reading`: to be read, not to be trained on."""
        encoded = Encoded()

        def make(client: str) -> bytes:
            card = self.federation.cards[client]
            return encoded(self._broadcast(replace(card, reading=True) if reading else card))

        return Lazy(clients, make)

    def _broadcast(self, card: Card) -> Payload:
        """May be made several times, in any order: what it draws is keyed by the client, not by the turn."""
        speaker = replace(self.server, id=f"{self.server.id} to {card.id}", uses={})
        return self.sums.announce(broadcast(self.algorithm, speaker, card))

    def _clock(self, round: int) -> None:
        self.server.clock, self.server.uses = self.federation.clock(round), {}

    # Evaluation --------------------------------------------------------------------------------------------------
    @told()
    def evaluate(self, details: bool = False, save: Callable[[str, bytes], None] | None = None) -> Readings:
        """Read the models of the federation's readers, in this cohort or not, as they would be used now; and the server's.

        What they receive for it is what they would receive next, and is counted like any other transfer. `details`: all
        that a report shows; each model (see `SavedModel.encode`) is then handed to `save` as it comes, and not kept.
        """
        self._clock(self.completed)
        ids = in_order(self.federation.readers)
        bodies = self.broadcasts(ids, reading=True)

        def counted(client: str) -> bytes:
            body = bodies[client]
            sizes[client] = len(body)
            return body

        sizes: dict[str, int] = {}
        clients: dict[str, Reading] = {}
        try:
            for id, reading in in_turn(ids, self.executor.read(Lazy(ids, counted), self.completed, details)):
                if save is not None:
                    save(id, reading.model)
                    reading.model = b""
                clients[id] = reading
        except (Diverged, PayloadError) as error:
            raise RunFailed(f"round {self.completed}: a model cannot be evaluated: {error}") from None
        if self.algorithm.counted:
            self.traffic.down += sum(sizes.values())
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
                (logits,) = self.performer.perform([(self.server, Predict(slot, Rows(rows, through=view)))])
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
            "bounds": self.sums.tree(),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """The reverse of `tree`."""
        self.completed = tree["completed"]
        self.server.models, self.server.state = tree["server"]["models"], tree["server"]["state"]
        self.traffic = Traffic(**tree["traffic"])
        self.sums.restore(tree["bounds"])
