"""The synchronous round: broadcast, train, channel, aggregate."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from hetero_fl.aggregation import Uploads
from hetero_fl.communication.protocol import (
    Message,
    Messages,
    Replies,
    Summed,
    Traffic,
    both_ways,
    hold_round,
)
from hetero_fl.engine.driver import Diverged, carry_out
from hetero_fl.federation.executors.base import Absent, Late, Reply, in_turn
from hetero_fl.federation.sampling import Invitation
from hetero_fl.federation.simulation.faults import befallen, once
from hetero_fl.federation.simulation.schedule import Schedule, ideal, schedule
from hetero_fl.federation.trainer import Record, Session
from hetero_fl.federation.upload_collector import Taken
from hetero_fl.utils.caching import Lazy
from hetero_fl.utils.errors import GivenUp, RunFailed
from hetero_fl.utils.ordering import in_order

UPLOADS = ("upload", "train")  # as the protocols call what comes of training
CHANGED = "upload refused: its bytes are not those that were sent"


@dataclass
class Held:
    """One attempt at a round: its tasks, what was taken, why the others' uploads were not, and why the protocol was given up."""

    schedule: Schedule
    taken: Taken = field(default_factory=lambda: Taken(Uploads()))
    failed: dict[str, str] = field(default_factory=dict)
    given_up: GivenUp | None = None

    @property
    def counts(self) -> Counter[str]:
        """invited = arrived + failed + late."""
        invited, late = len(self.schedule.tasks), len(self.schedule.late)
        return Counter(
            invited=invited,
            arrived=invited - late - len(self.failed),
            failed=len(self.failed),
            late=late,
        )


class Rounds(Session):
    """Rounds that wait for their cohort, or for as much of it as the policy wants."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.invitation = Invitation(self.conditions)

    def cohort(self, round: int) -> list[str]:
        """Who is invited to that round, were it held now: everyone, or some of them drawn by the key, in id order."""
        return self.invitation.draw(round, 0, self.now)[0]

    def _hold(self) -> Record:
        if self.apart is not None:
            self.now = self.real()
        begun, start, before = time.perf_counter(), self.now, (self.traffic.up, self.traffic.down)
        tries = [self._attempt(0)]
        while self._too_few(tries[-1]) and self.conditions.too_few == "repeat":
            if len(tries) == self.conditions.policy.attempts:
                break
            self.store.discard()
            tries.append(self._attempt(len(tries)))
        held, skipped = tries[-1], self._too_few(tries[-1])
        diverged = ""
        if skipped:
            self._give_up(held, len(tries))
        else:
            diverged = self._tried(lambda: self._aggregate(held.taken), held.taken.magnitudes)
        if diverged:
            self.store.discard()
        self._may_be_killed()
        self.store.commit()
        self.completed += 1
        return {
            "round": self.completed,
            "cohort": list(held.schedule.tasks),
            "failed": {client: why for each in tries for client, why in each.failed.items()},
            "train_loss": held.taken.losses,
            "up_bytes": self.traffic.up - before[0],
            "down_bytes": self.traffic.down - before[1],
            **self._robustness(held.taken),
            "seconds": {"training": time.perf_counter() - begun, "evaluation": 0.0},
            **(
                {"simulated": {"start": start, "end": self.now}, **_told(tries)}
                if self.conditions.simulated
                else {}
            ),
            **self._lived(start, tries),
            **({"skipped": True} if skipped or diverged else {}),
            **({"diverged": diverged} if diverged else {}),
        }

    # One attempt ---------------------------------------------------------------------------------------------------
    def _attempt(self, attempt: int) -> Held:
        """Invite a cohort, have those train whose uploads will be there in time, and take these; simulated time passes."""
        index = self.completed
        self._clock(index)
        cohort, at = self.invitation.draw(index, attempt, self.now)
        if not self.conditions.simulated:
            held = Held(ideal(cohort, at if self.apart is None else self.real()))
            self._exchange(held, 0)
            if self.apart is not None:
                self.now = held.schedule.end = self.real()
            self.invitation.learn(held.schedule, held.taken.losses, index)
            return held
        bodies, task = self.broadcasts(cohort), number(index, attempt)
        sizes = {c: self._sizes(c, len(bodies[c]), len(cohort)) for c in cohort}
        plan = schedule(cohort, self.conditions, lambda c: both_ways(sizes[c].values()), at, task)
        held = Held(plan, failed=dict(plan.failed))
        useful = plan.expected >= self.conditions.policy.least
        if useful:
            self._exchange(held, task)
        else:  # nothing would be made of what they compute
            held.failed |= {
                c: CHANGED for c in plan.asked if plan.tasks[c].fate.what == "corrupted"
            }
        self.now = plan.end
        self.invitation.learn(plan, held.taken.losses, index)
        if self.algorithm.counted:
            self.traffic.up += sum(sizes[c]["train"][1] for c in plan.in_vain)
            counted = set(self._partners(plan)) if useful else set()
            self.traffic.down += sum(
                both_ways(sizes[c].values())[0] for c in cohort if c not in counted
            )
            self.traffic.up += sum(
                both_ways(sizes[c].values())[1] for c in plan.asked if c not in counted
            )
        return held

    def _sizes(self, client: str, broadcast: int, cohort: int) -> dict[str, tuple[int, int]]:
        """Bytes down and up of all that the round asks of a client, known before anything is computed."""
        card, round = self.federation.cards[client], self.completed
        alone = 0 if self.protocol.setup else self.upload_bytes(card, self._broadcast(card), round)
        return self.protocol.sizes(cohort, round, broadcast, alone)

    def _partners(self, plan: Schedule) -> list[str]:
        """With whom the protocol begins: those whose uploads will come, or all, where they exchange something before."""
        return list(plan.tasks) if self.protocol.setup else plan.asked

    def _exchange(self, held: Held, task: int) -> None:
        """Broadcast, training, and what comes of it."""
        index, plan, failed = self.completed, held.schedule, held.failed
        traffic = self.traffic if self.algorithm.counted else Traffic()
        fates = {client: plan.tasks[client].fate for client in plan.asked}

        def usable(arrival: tuple[str, Reply]) -> TypeGuard[tuple[str, Message]]:
            client, reply = arrival
            if not isinstance(reply, Diverged):
                if reply.intact:
                    return True
                failed[client] = CHANGED
                self.store.drop(client)
                traffic.up += len(reply.body)
                return False
            if isinstance(reply, Late):
                plan.late.append(client)
            else:
                failed[client] = str(reply)
            if self.stop_on_divergence and not isinstance(reply, Absent):
                raise RunFailed(f"round {index + 1}: {client} diverged: {reply}")
            return False

        asked = set(plan.asked)
        turn = itertools.count(-len(self.protocol.setup))  # 0: the exchange in which they train

        def exchange(requests: Messages) -> Replies:
            at = next(turn)
            answering = plan.there if at < 0 else asked
            there = [c for c in requests if c in answering]
            for gone in [c for c in requests if c not in answering]:
                requests[gone]  # is sent, and counted, all the same
            given = Lazy(
                there, lambda c: replace(requests[c], round=index, work=plan.tasks[c].work)
            )
            answers = self.executor.answer(given)
            replies = in_turn(
                there, answers if self.apart is None else self._timely(plan, there, answers)
            )
            if at == 0 and any(fate.what in ("twice", "corrupted") for fate in fates.values()):
                replies = once(befallen(replies, fates, self.federation.seed, "changed", task))
            return filter(usable, replies)

        try:
            arrivals = hold_round(
                self.protocol, self.broadcasts(self._partners(plan)), exchange, traffic, index
            )
        except GivenUp as error:
            held.given_up = error
            failed.update(
                {
                    c: "the round was given up"
                    for c in plan.asked
                    if c not in failed and c not in plan.late
                }
            )
            return
        if isinstance(arrivals, Summed):  # whoever left later is in the sum all the same
            plan.late = [c for c in plan.late if c not in arrivals.clients]
            for client in arrivals.clients:
                failed.pop(client, None)
        held.taken = self.intake.take(arrivals, self.heard(index), index)
        for client, why in held.taken.refused.items():
            self.store.drop(client)
            if client in asked and client not in plan.late:  # what became of the others is known
                failed.setdefault(client, f"upload refused: {why}")

    def _timely(
        self, plan: Schedule, asked: Collection[str], answers: Iterator[tuple[str, Reply]]
    ) -> Iterator[tuple[str, Reply]]:
        """Where time is real: the answers until there are as many uploads as are wanted. Whoever is still at it then is late."""
        still, uploads = dict.fromkeys(asked), 0
        wanted = min(len(plan.tasks), self.conditions.per_round or len(plan.tasks))
        for client, reply in answers:
            plan.tasks[client] = replace(plan.tasks[client], ends=self.real())
            del still[client]
            uploads += isinstance(reply, Message) and reply.ask in UPLOADS
            yield client, reply
            del reply  # a model's worth
            if uploads == wanted < len(plan.tasks):
                break
        for client in in_order(still):
            plan.late.append(client)
            plan.tasks[client] = replace(plan.tasks[client], ends=math.inf)

    def _lived(self, start: float, tries: list[Held]) -> dict[str, Any]:
        """What a record says of a round that took real time."""
        if self.apart is None:
            return {}
        anew = {"anew": lost} if (lost := self.apart.anew()) else {}
        return {"wall": {"start": start, "end": self.now}, **_told(tries), **anew}

    # What is made of it --------------------------------------------------------------------------------------------
    def _too_few(self, held: Held) -> bool:
        """A cohort that nobody was drawn into (`privacy.poisson_cohorts`) is as good as any: its sum is noise."""
        return bool(held.schedule.tasks) and len(held.taken.uploads) < self.conditions.policy.least

    def _aggregate(self, taken: Taken) -> None:
        if taken.rules is not None:
            copy = replace(self.server, models=dict(self.server.models), uses={})
            carry_out(taken.uploads.prepare(copy), copy, self.performer)
        carry_out(self.algorithm.aggregate(self.server, taken.uploads), self.server, self.performer)
        self.sums.adapt(taken.uploads)

    def _robustness(self, taken: Taken) -> dict[str, Any]:
        """What a record says of rules that bear liars, and of liars."""
        few = (
            {"too_few": taken.rules.too_few}
            if taken.rules is not None and taken.rules.too_few
            else {}
        )
        return {
            **few,
            **({"attacks": {"liars": taken.liars}} if self.federation.liars is not None else {}),
        }

    def _give_up(self, held: Held, tries: int) -> None:
        """A round that changes nothing; or RunFailed, where that is the policy."""
        if self.conditions.too_few == "skip":
            return self.store.discard()
        if held.given_up is not None:
            raise held.given_up
        found, least = len(held.taken.uploads), self.conditions.policy.least
        what = f"{found} of at least {least} usable uploads" if least > 1 else "no usable upload"
        invited, late = len(held.schedule.tasks), len(held.schedule.late)
        told = (f"{client}: {why}" for client, why in held.failed.items())
        why = next(told, f"{late} of them late" if late else "")
        raise RunFailed(
            f"round {self.completed + 1}: {what} from {invited} client{'s' if invited != 1 else ''}"
            f"{f', {tries} times' if tries > 1 else ''}{f'; {why}' if why else ''}"
        )

    # Crash safety --------------------------------------------------------------------------------------------------
    def tree(self) -> dict[str, Any]:
        known = self.invitation.tree()
        return {**super().tree(), **({"invitation": known} if known else {})}

    def restore(self, tree: dict[str, Any]) -> None:
        super().restore(tree)
        self.invitation.restore(tree.get("invitation", {}))


def number(round: int, attempt: int) -> int:
    """Of the tasks of one attempt at a round: of the first one the round's own."""
    return attempt << 32 | round


def _told(tries: list[Held]) -> dict[str, Any]:
    """What `metrics.jsonl` says of the tasks."""
    counts: Counter[str] = sum((held.counts for held in tries), Counter())
    names = ("invited", "arrived", "failed", "late")
    repeated = {"attempts": len(tries)} if len(tries) > 1 else {}
    tasks = [row for held in tries for row in held.schedule.record(held.failed)]
    return {"counts": {name: counts[name] for name in names}, **repeated, "tasks": tasks}
