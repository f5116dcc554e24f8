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
    AggregatedUploads,
    Message,
    Messages,
    Replies,
    Traffic,
    run_protocol,
    total_bytes,
)
from hetero_fl.engine.driver import DivergedError, run_plan
from hetero_fl.federation.executors.base import (
    ClientAbsentError,
    ClientLateError,
    Reply,
    order_arrivals,
)
from hetero_fl.federation.sampling import ClientSampler
from hetero_fl.federation.simulation.faults import drop_duplicates, inject_faults
from hetero_fl.federation.simulation.schedule import Schedule, immediate_schedule, make_schedule
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import CollectedUploads
from hetero_fl.utils.caching import LazyMapping
from hetero_fl.utils.errors import RoundAbandonedError, RunFailedError
from hetero_fl.utils.ordering import natural_order

UPLOADS = ("upload", "train")  # as the protocols call what comes of training
CHANGED = "upload refused: its bytes are not those that were sent"


@dataclass
class RoundAttempt:
    """One attempt at a round: its tasks, what was taken, why the others' uploads were not, and why the protocol was given up."""

    schedule: Schedule
    collected: CollectedUploads = field(default_factory=lambda: CollectedUploads(Uploads()))
    failed: dict[str, str] = field(default_factory=dict)
    abandoned: RoundAbandonedError | None = None

    @property
    def counts(self) -> Counter[str]:
        """invited = arrived + failed + late."""
        invited = len(self.schedule.tasks)
        late = len(self.schedule.late)
        return Counter(
            invited=invited,
            arrived=invited - late - len(self.failed),
            failed=len(self.failed),
            late=late,
        )


class SynchronousTrainer(FederatedTrainer):
    """Rounds that wait for their cohort, or for as much of it as the policy wants."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.sampler = ClientSampler(self.environment)

    def sample_cohort(self, round_idx: int) -> list[str]:
        """Who is invited to that round, were it held now: everyone, or some of them drawn by the key, in id order."""
        return self.sampler.sample(round_idx, 0, self.now)[0]

    def _run_round(self) -> Record:
        if self.remote_executor is not None:
            self.now = self.elapsed_seconds()
        begun = time.perf_counter()
        start = self.now
        before = (self.traffic.up, self.traffic.down)
        tries = [self._attempt(0)]
        while self._too_few(tries[-1]) and self.environment.on_too_few == "repeat":
            if len(tries) == self.environment.policy.attempts:
                break
            self.store.discard()
            tries.append(self._attempt(len(tries)))
        held = tries[-1]
        skipped = self._too_few(tries[-1])
        diverged = ""
        if skipped:
            self._skip_or_fail(held, len(tries))
        else:
            diverged = self._change_server(
                lambda: self._aggregate(held.collected), held.collected.magnitudes
            )
        if diverged:
            self.store.discard()
        self._simulate_server_crash()
        self.store.commit()
        self.completed += 1
        return {
            "round": self.completed,
            "cohort": list(held.schedule.tasks),
            "failed": {client: why for each in tries for client, why in each.failed.items()},
            "train_loss": held.collected.losses,
            **({"logged": held.collected.logged} if held.collected.logged else {}),
            "up_bytes": self.traffic.up - before[0],
            "down_bytes": self.traffic.down - before[1],
            **self._robustness_record(held.collected),
            "seconds": {"training": time.perf_counter() - begun, "evaluation": 0.0},
            **(
                {"simulated": {"start": start, "end": self.now}, **_task_record(tries)}
                if self.environment.simulated
                else {}
            ),
            **self._real_time_record(start, tries),
            **({"skipped": True} if skipped or diverged else {}),
            **({"diverged": diverged} if diverged else {}),
        }

    # One attempt ---------------------------------------------------------------------------------------------------
    def _attempt(self, attempt: int) -> RoundAttempt:
        """Invite a cohort, have those train whose uploads will be there in time, and take these; simulated time passes."""
        index = self.completed
        self._set_round_context(index)
        cohort, at = self.sampler.sample(index, attempt, self.now)
        if not self.environment.simulated:
            held = RoundAttempt(
                immediate_schedule(
                    cohort, at if self.remote_executor is None else self.elapsed_seconds()
                )
            )
            self._exchange(held, 0)
            if self.remote_executor is not None:
                self.now = held.schedule.end = self.elapsed_seconds()
            self.sampler.update(held.schedule, held.collected.losses, index)
            return held
        bodies = self.broadcasts(cohort)
        task = task_number(index, attempt)
        sizes = {c: self._sizes(c, len(bodies[c]), len(cohort)) for c in cohort}
        plan = make_schedule(
            cohort, self.environment, lambda c: total_bytes(sizes[c].values()), at, task
        )
        held = RoundAttempt(plan, failed=dict(plan.failed))
        useful = plan.num_expected >= self.environment.policy.least
        if useful:
            self._exchange(held, task)
        else:  # nothing would be made of what they compute
            held.failed |= {
                c: CHANGED for c in plan.computing if plan.tasks[c].outcome.kind == "corrupted"
            }
        self.now = plan.end
        self.sampler.update(plan, held.collected.losses, index)
        if self.algorithm.needs.counts_traffic:
            self.traffic.up += sum(sizes[c]["train"][1] for c in plan.wasted_uploads)
            counted = set(self._protocol_clients(plan)) if useful else set()
            self.traffic.down += sum(
                total_bytes(sizes[c].values())[0] for c in cohort if c not in counted
            )
            self.traffic.up += sum(
                total_bytes(sizes[c].values())[1] for c in plan.computing if c not in counted
            )
        return held

    def _sizes(self, client: str, broadcast: int, cohort: int) -> dict[str, tuple[int, int]]:
        """Bytes down and up of all that the round asks of a client, known before anything is computed."""
        card = self.federation.client_infos[client]
        round = self.completed
        alone = 0 if self.protocol.setup else self.upload_bytes(card, self._broadcast(card), round)
        return self.protocol.sizes(cohort, round, broadcast, alone)

    def _protocol_clients(self, plan: Schedule) -> list[str]:
        """With whom the protocol begins: those whose uploads will come, or all, where they exchange something before."""
        return list(plan.tasks) if self.protocol.setup else plan.computing

    def _exchange(self, attempt: RoundAttempt, task: int) -> None:
        """Broadcast, training, and what comes of it."""
        index = self.completed
        plan = attempt.schedule
        failed = attempt.failed
        traffic = self.traffic if self.algorithm.needs.counts_traffic else Traffic()
        fates = {client: plan.tasks[client].outcome for client in plan.computing}

        def usable(arrival: tuple[str, Reply]) -> TypeGuard[tuple[str, Message]]:
            client, reply = arrival
            if not isinstance(reply, DivergedError):
                if reply.is_intact:
                    return True
                failed[client] = CHANGED
                self.store.discard_client(client)
                traffic.up += len(reply.body)
                return False
            if isinstance(reply, ClientLateError):
                plan.late.append(client)
            else:
                failed[client] = str(reply)
            if self.stop_on_divergence and not isinstance(reply, ClientAbsentError):
                raise RunFailedError(f"round {index + 1}: {client} diverged: {reply}")
            return False

        asked = set(plan.computing)
        turn = itertools.count(-len(self.protocol.setup))  # 0: the exchange in which they train

        def exchange(requests: Messages) -> Replies:
            at = next(turn)
            answering = plan.protocol_clients if at < 0 else asked
            there = [c for c in requests if c in answering]
            for gone in [c for c in requests if c not in answering]:
                requests[gone]  # is sent, and counted, all the same
            given = LazyMapping(
                there,
                lambda c: replace(
                    requests[c], round_idx=index, step_share=plan.tasks[c].step_share
                ),
            )
            answers = self.executor.run(given)
            replies = order_arrivals(
                there,
                answers
                if self.remote_executor is None
                else self._replies_in_time(plan, there, answers),
            )
            if at == 0 and any(fate.kind in ("twice", "corrupted") for fate in fates.values()):
                replies = drop_duplicates(
                    inject_faults(replies, fates, self.federation.seed, "changed", task)
                )
            return filter(usable, replies)

        try:
            arrivals = run_protocol(
                self.protocol,
                self.broadcasts(self._protocol_clients(plan)),
                exchange,
                traffic,
                index,
            )
        except RoundAbandonedError as error:
            attempt.abandoned = error
            failed.update(
                {
                    c: "the round was given up"
                    for c in plan.computing
                    if c not in failed and c not in plan.late
                }
            )
            return
        if isinstance(arrivals, AggregatedUploads):  # whoever left later is in the sum all the same
            plan.late = [c for c in plan.late if c not in arrivals.clients]
            for client in arrivals.clients:
                failed.pop(client, None)
        attempt.collected = self.collector.collect(arrivals, self.decoded_broadcasts(index), index)
        for client, why in attempt.collected.refused.items():
            self.store.discard_client(client)
            if client in asked and client not in plan.late:  # what became of the others is known
                failed.setdefault(client, f"upload refused: {why}")

    def _replies_in_time(
        self, plan: Schedule, client_ids: Collection[str], answers: Iterator[tuple[str, Reply]]
    ) -> Iterator[tuple[str, Reply]]:
        """Where time is real: the answers until there are as many uploads as are wanted. Whoever is still at it then is late."""
        still = dict.fromkeys(client_ids)
        uploads = 0
        wanted = min(len(plan.tasks), self.environment.per_round or len(plan.tasks))
        for client, reply in answers:
            plan.tasks[client] = replace(plan.tasks[client], end=self.elapsed_seconds())
            del still[client]
            uploads += isinstance(reply, Message) and reply.kind in UPLOADS
            yield client, reply
            del reply  # a model's worth
            if uploads == wanted < len(plan.tasks):
                break
        for client in natural_order(still):
            plan.late.append(client)
            plan.tasks[client] = replace(plan.tasks[client], end=math.inf)

    def _real_time_record(self, start: float, tries: list[RoundAttempt]) -> dict[str, Any]:
        """What a record says of a round that took real time."""
        if self.remote_executor is None:
            return {}
        anew = {"anew": lost} if (lost := self.remote_executor.pop_reset_clients()) else {}
        return {"wall": {"start": start, "end": self.now}, **_task_record(tries), **anew}

    # What is made of it --------------------------------------------------------------------------------------------
    def _too_few(self, attempt: RoundAttempt) -> bool:
        """A cohort that nobody was drawn into (`privacy.poisson_cohorts`) is as good as any: its sum is noise."""
        return (
            bool(attempt.schedule.tasks)
            and len(attempt.collected.uploads) < self.environment.policy.least
        )

    def _aggregate(self, collected: CollectedUploads) -> None:
        if collected.rules is not None:
            copy = replace(self.server, models=dict(self.server.models), stream_uses={})
            run_plan(collected.uploads.prepare(copy), copy, self.backend)
        run_plan(
            self.algorithm.aggregate(self.server, collected.uploads), self.server, self.backend
        )
        self.server_privacy.adapt_bounds(collected.uploads)

    def _robustness_record(self, collected: CollectedUploads) -> dict[str, Any]:
        """What a record says of rules that bear liars, and of liars."""
        few = (
            {"too_few": collected.rules.too_few}
            if collected.rules is not None and collected.rules.too_few
            else {}
        )
        return {
            **few,
            **(
                {"attacks": {"liars": collected.malicious}}
                if self.federation.malicious is not None
                else {}
            ),
        }

    def _skip_or_fail(self, attempt: RoundAttempt, tries: int) -> None:
        """A round that changes nothing; or RunFailedError, where that is the policy."""
        if self.environment.on_too_few == "skip":
            return self.store.discard()
        if attempt.abandoned is not None:
            raise attempt.abandoned
        found = len(attempt.collected.uploads)
        least = self.environment.policy.least
        what = f"{found} of at least {least} usable uploads" if least > 1 else "no usable upload"
        invited = len(attempt.schedule.tasks)
        late = len(attempt.schedule.late)
        told = (f"{client}: {why}" for client, why in attempt.failed.items())
        why = next(told, f"{late} of them late" if late else "")
        raise RunFailedError(
            f"round {self.completed + 1}: {what} from {invited} client{'s' if invited != 1 else ''}"
            f"{f', {tries} times' if tries > 1 else ''}{f'; {why}' if why else ''}"
        )

    # Crash safety --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        known = self.sampler.state_dict()
        return {**super().state_dict(), **({"invitation": known} if known else {})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sampler.load_state_dict(state.get("invitation", {}))


def task_number(round_idx: int, attempt: int) -> int:
    """Of the tasks of one attempt at a round: of the first one the round's own."""
    return attempt << 32 | round_idx


def _task_record(tries: list[RoundAttempt]) -> dict[str, Any]:
    """What `metrics.jsonl` says of the tasks."""
    counts: Counter[str] = sum((held.counts for held in tries), Counter())
    names = ("invited", "arrived", "failed", "late")
    repeated = {"attempts": len(tries)} if len(tries) > 1 else {}
    tasks = [row for held in tries for row in held.schedule.record(held.failed)]
    return {"counts": {name: counts[name] for name in names}, **repeated, "tasks": tasks}
