"""The synchronous round: broadcast, train, channel, aggregate."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeGuard

from hetero_fl.channel.protocol import Message, Messages, Replies, Traffic, hold_round
from hetero_fl.errors import RunFailed
from hetero_fl.lazy import Lazy
from hetero_fl.runtime.executor import Reply, in_turn
from hetero_fl.runtime.federation import Federation
from hetero_fl.runtime.plans import Diverged, carry_out
from hetero_fl.runtime.readings import Record
from hetero_fl.runtime.session import Session
from hetero_fl.seeding import sample


def draw_cohort(federation: Federation, per_round: int | None, round: int) -> list[str]:
    """Everyone, or `per_round` clients drawn by the key of that round, in id order."""
    ids = federation.cards.clients.ids
    if per_round is None or per_round >= len(ids):
        return list(ids)
    return [ids[i] for i in sample(len(ids), per_round, federation.seed, round, "cohort")]


class Rounds(Session):
    """Rounds that wait for the whole cohort."""

    def cohort(self, round: int) -> list[str]:
        """Who takes part in that round: everyone, or `per_round` of them drawn by the key, in id order."""
        return draw_cohort(self.federation, self.per_round, round)

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
            of_now = Lazy(requests.keys(), lambda client: replace(requests[client], round=index))
            return filter(usable, in_turn(list(requests), self.executor.answer(of_now)))

        traffic = self.traffic if self.algorithm.counted else Traffic()
        arrivals = hold_round(self.protocol, self.broadcasts(cohort), exchange, traffic)
        taken = self.intake.take(arrivals, self._broadcast, index)
        for client, why in taken.refused.items():
            failed[client] = f"upload refused: {why}"
            self.store.drop(client)
        if not taken.uploads:
            raise RunFailed(
                f"round {index + 1}: no usable upload from {len(cohort)} clients; {next(iter(failed.items()), '')}"
            )
        try:
            carry_out(self.algorithm.aggregate(self.server, taken.uploads), self.server, self.performer)
        except Diverged as error:
            raise RunFailed(f"round {index + 1}: training at the server diverged: {error}") from None
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
