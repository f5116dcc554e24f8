"""Trainers of synchronous rounds with simulated or real time and repeated attempts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from hetero_fl.communication.protocol import Exchange, Message, Reply, content_size, total_bytes
from hetero_fl.federation.channel import UploadSizes
from hetero_fl.federation.simulation.faults import drop_duplicates, inject_faults
from hetero_fl.federation.simulation.sampling import ClientSampler
from hetero_fl.federation.simulation.schedule import (
    Schedule,
    SimulationEnvironment,
    immediate_schedule,
    make_schedule,
)
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.federation.trainer import Record
from hetero_fl.federation.upload_collector import DAMAGED, UploadCollector


@dataclass
class RoundAttempt:
    """One attempt at a round.

    Attributes:
        schedule: Schedule of the tasks.
        failed: Reasons why clients failed, keyed by client id.
        late: Ids of clients that had not replied when the round ended.
    """

    schedule: Schedule
    failed: dict[str, str]
    late: list[str]

    @property
    def counts(self) -> Counter[str]:
        """Number of tasks, keyed by outcome.

        The outcomes are "arrived", "failed" and "late". The entry "invited" is the sum of these
        entries.
        """
        invited = len(self.schedule.tasks)
        late = len(self.late)
        failed = len(self.failed)
        return Counter(invited=invited, arrived=invited - late - failed, failed=failed, late=late)

    def task_rows(self) -> list[list[object]]:
        """Return a list `[client, start, end, outcome]` for each task, with times in seconds."""
        return self.schedule.record(self.failed, self.late)


class ScheduledTrainer(SynchronousTrainer):
    """Synchronous trainer with the policies of a `SimulationEnvironment`.

    The environment determines how cohorts are sampled, how much time tasks take, and whether rounds
    with too few uploads are repeated.

    Args:
        *args: Arguments of `SynchronousTrainer`.
        environment: The conditions of the run.
        **options: Keyword arguments of `SynchronousTrainer`.
    """

    def __init__(self, *args: Any, environment: SimulationEnvironment, **options: Any) -> None:
        super().__init__(*args, policy=environment.policy, **options)
        self.environment = environment
        self.sampler = ClientSampler(environment)
        self._sampled_at = 0.0
        self._attempts: list[RoundAttempt] = []

    @property
    @override
    def on_too_few(self) -> str:
        return self.environment.on_too_few

    @property
    @override
    def fingerprint(self) -> str:
        return self.environment.devices.fingerprint

    @override
    def run_round(self) -> Record:
        start = self.now
        record = super().run_round()
        # The failures of all attempts are listed, but only the cohort of the last attempt.
        failed: dict[str, str] = {}
        for attempt in self._attempts:
            failed |= attempt.failed
        record["failed"] = failed
        flags = {key: record.pop(key) for key in ("skipped", "diverged") if key in record}
        return record | self.time_record(start) | flags

    @override
    def sample_cohort(self, round_idx: int, attempt: int = 0) -> list[str]:
        cohort, self._sampled_at = self.sampler.sample(round_idx, attempt, self.now)
        return cohort

    @override
    def collect(self, cohort: list[str]) -> UploadCollector:
        """Collect the uploads of a cohort, and repeat the round if there are too few uploads.

        The round is repeated only if `on_too_few` is "repeat". Each attempt has a newly sampled
        cohort. The uploads of the last attempt are returned.
        """
        self._attempts = []
        collector = self.collect_attempt(cohort, 0)
        while not collector.is_sufficient and self.on_too_few == "repeat":
            number = len(self._attempts)
            if number == self.policy.attempts:
                break
            # Free the uploads before the next attempt.
            del collector
            self.store.discard()
            self._set_round_context(self.round_idx)
            collector = self.collect_attempt(self.sample_cohort(self.round_idx, number), number)
        return collector

    def collect_attempt(self, cohort: list[str], number: int) -> UploadCollector:
        """Make one attempt at the round, and return the collected uploads.

        Args:
            cohort: Ids of the clients.
            number: Number of earlier attempts.
        """
        collector = UploadCollector(self, cohort)
        collector.attempts = number + 1
        schedule = self.run_attempt(collector, number)
        self._attempts.append(RoundAttempt(schedule, collector.failed, collector.late))
        self.sampler.update(schedule, collector.losses, self.round_idx)
        return collector

    def run_attempt(self, collector: UploadCollector, number: int) -> Schedule:
        """Collect the uploads of a cohort, and return the schedule of the tasks.

        Args:
            collector: Collector of the uploads.
            number: Number of earlier attempts.
        """
        schedule = immediate_schedule(collector.cohort, self._sampled_at)
        self.exchange(schedule, collector, collector.cohort, task=0)
        return schedule

    def exchange(
        self, schedule: Schedule, collector: UploadCollector, clients: Sequence[str], task: int
    ) -> None:
        """Run the exchanges of a round.

        Requests to clients that do not reply also count as traffic.

        Args:
            schedule: Schedule of the round.
            collector: Collector of the replies.
            clients: Ids of the clients of the cohort that participate.
            task: Number of the tasks, which seeds random draws.
        """
        for exchange in collector.exchanges(clients):
            present: Collection[str] = schedule.computing
            if exchange.kind in self.protocol.setup:
                present = schedule.protocol_clients
            for client_id in exchange.clients:
                if client_id not in present:
                    collector.request(exchange, client_id)
            replying = [client_id for client_id in exchange.clients if client_id in present]
            for client_id, reply in self.replies(schedule, collector, exchange, replying, task):
                collector.add(exchange, client_id, reply)
                # Free the upload before the next client trains.
                del reply
        collector.finish()
        self.count_traffic(collector.up_bytes, collector.down_bytes)

    def replies(
        self,
        schedule: Schedule,
        collector: UploadCollector,
        exchange: Exchange,
        clients: Sequence[str],
        task: int,
    ) -> Iterator[tuple[str, Reply]]:
        """Send the requests of an exchange, and yield the replies in the order of `clients`.

        Args:
            schedule: Schedule of the round.
            collector: Collector that creates the requests.
            exchange: The exchange.
            clients: Ids of the clients that reply.
            task: Number of the tasks, which seeds random draws.

        Yields:
            Pairs of client id and reply.
        """

        def request(client_id: str) -> Message:
            message = collector.request(exchange, client_id)
            return replace(message, step_share=schedule.tasks[client_id].step_share)

        return self.executor.run(clients, request)

    def time_record(self, start: float) -> dict[str, Any]:
        """Return the entries of the round's record for the start, the end and the tasks.

        The base class returns no entries.

        Args:
            start: Time at which the round began, in seconds.
        """
        return {}

    def task_record(self) -> dict[str, Any]:
        """Return the entries of the round's record for the tasks of all attempts.

        The entries are `counts`, `tasks` and, if the round was repeated, `attempts`.
        """
        counts: Counter[str] = sum((attempt.counts for attempt in self._attempts), Counter())
        names = ("invited", "arrived", "failed", "late")
        record: dict[str, Any] = {"counts": {name: counts[name] for name in names}}
        if len(self._attempts) > 1:
            record["attempts"] = len(self._attempts)
        record["tasks"] = [row for attempt in self._attempts for row in attempt.task_rows()]
        return record

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        known = self.sampler.state_dict()
        return state | {"invitation": known} if known else state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sampler.load_state_dict(state.get("invitation", {}))
        self.now = state.get("now", 0.0)


class SimulatedTrainer(ScheduledTrainer):
    """Synchronous trainer in simulated time, in which tasks take time and may fail.

    The arguments are the same as those of `ScheduledTrainer`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.upload_sizes = UploadSizes(self.algorithm, self.federation, self.expectations)

    @override
    def run_attempt(self, collector: UploadCollector, number: int) -> Schedule:
        """Collect the uploads that arrive in time, and return the schedule of the tasks.

        Other uploads are not computed. If too few uploads would arrive in time, no upload is
        computed.
        """
        cohort = collector.cohort
        task = task_number(self.round_idx, number)
        sizes = {client_id: self._sizes(client_id, len(cohort)) for client_id in cohort}
        schedule = make_schedule(
            cohort,
            self.environment,
            lambda client_id: total_bytes(sizes[client_id].values()),
            self._sampled_at,
            task,
        )
        for client_id, reason in schedule.failed.items():
            collector.fail(client_id, reason)
        collector.late.extend(schedule.late)
        requested: Sequence[str] = ()
        if schedule.num_expected >= self.policy.least:
            requested = cohort if self.protocol.setup else schedule.computing
            self.exchange(schedule, collector, requested, task)
        else:
            # There are too few uploads for an aggregation, so none is computed.
            for client_id in schedule.computing:
                if schedule.tasks[client_id].outcome.kind == "corrupted":
                    collector.fail(client_id, DAMAGED)
        self.now = schedule.end
        self._count_unseen_traffic(schedule, sizes, set(requested))
        return schedule

    @override
    def replies(
        self,
        schedule: Schedule,
        collector: UploadCollector,
        exchange: Exchange,
        clients: Sequence[str],
        task: int,
    ) -> Iterator[tuple[str, Reply]]:
        replies = super().replies(schedule, collector, exchange, clients, task)
        outcomes = {c: schedule.tasks[c].outcome for c in schedule.computing}
        has_faults = any(outcome.kind in ("twice", "corrupted") for outcome in outcomes.values())
        if exchange.kind != "train" or not has_faults:
            return replies
        return drop_duplicates(
            inject_faults(replies, outcomes, self.federation.seed, "changed", task)
        )

    def _sizes(self, client_id: str, cohort_size: int) -> dict[str, tuple[int, int]]:
        """Return the expected bytes sent to and by a client, keyed by the kind of exchange."""
        client_info = self.federation.client_infos[client_id]
        payload = self.broadcast(client_info)
        upload = 0
        if not self.protocol.setup:
            upload = self.upload_sizes(client_info, payload, self.round_idx)
        broadcast = content_size(self.broadcasts.content(payload))
        return self.protocol.sizes(cohort_size, self.round_idx, broadcast, upload)

    def _count_unseen_traffic(
        self, schedule: Schedule, sizes: dict[str, dict[str, tuple[int, int]]], seen: set[str]
    ) -> None:
        """Count the traffic of messages that the simulation does not create or does not use."""
        wasted = sum(sizes[client_id]["train"][1] for client_id in schedule.wasted_uploads)
        totals = {
            client_id: total_bytes(sizes[client_id].values())
            for client_id in schedule.tasks
            if client_id not in seen
        }
        down = sum(total[0] for total in totals.values())
        up = sum(totals[client_id][1] for client_id in schedule.computing if client_id in totals)
        self.count_traffic(wasted + up, down)

    @override
    def time_record(self, start: float) -> dict[str, Any]:
        return {"simulated": {"start": start, "end": self.now}, **self.task_record()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"now": self.now}


def task_number(round_idx: int, attempt: int) -> int:
    """Return the number of the tasks of an attempt, which seeds random draws.

    The number is `round_idx` for the first attempt.

    Args:
        round_idx: Index of the round, from 0.
        attempt: Number of earlier attempts at the round.
    """
    return attempt << 32 | round_idx
