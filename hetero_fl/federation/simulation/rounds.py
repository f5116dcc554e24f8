"""Trainers of synchronous rounds with simulated or real time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from typing_extensions import override

from hetero_fl.communication.protocol import Exchange, Reply, content_size, total_bytes
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


class ScheduledTrainer(SynchronousTrainer):
    """Synchronous trainer with the policies of a `SimulationEnvironment`.

    The environment determines how cohorts are sampled, how much time tasks take, and what happens
    in rounds with too few uploads.

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
        self._schedule = immediate_schedule([])
        # Clients of the last round that failed or had not replied when the round ended.
        self._failed: Collection[str] = ()
        self._late: Collection[str] = ()

    @property
    @override
    def on_too_few(self) -> str:
        return self.environment.on_too_few

    @override
    def run_round(self) -> Record:
        start = self.now
        record = super().run_round()
        flags = {key: record.pop(key) for key in ("skipped", "diverged") if key in record}
        return record | self.time_record(start) | flags

    @override
    def sample_cohort(self, round_idx: int) -> list[str]:
        cohort, self._sampled_at = self.sampler.sample(round_idx, self.now)
        return cohort

    @override
    def collect(self, cohort: list[str]) -> UploadCollector:
        collector = UploadCollector(self, cohort)
        self._schedule = self.run_tasks(collector)
        self._failed = collector.failed
        self._late = collector.late
        return collector

    def run_tasks(self, collector: UploadCollector) -> Schedule:
        """Collect the uploads of a cohort, and return the schedule of the tasks.

        Args:
            collector: Collector of the uploads.
        """
        schedule = immediate_schedule(collector.cohort, self._sampled_at)
        self.exchange(schedule, collector, collector.cohort)
        return schedule

    def exchange(
        self, schedule: Schedule, collector: UploadCollector, clients: Sequence[str]
    ) -> None:
        """Run the exchanges of a round.

        Requests to clients that do not reply also count as traffic.

        Args:
            schedule: Schedule of the round.
            collector: Collector of the replies.
            clients: Ids of the clients of the cohort that participate.
        """
        for exchange in collector.exchanges(clients):
            present: Collection[str] = schedule.computing
            if exchange.kind in self.protocol.setup:
                present = schedule.protocol_clients
            for client_id in exchange.clients:
                if client_id not in present:
                    collector.request(exchange, client_id)
            replying = [client_id for client_id in exchange.clients if client_id in present]
            for client_id, reply in self.replies(schedule, collector, exchange, replying):
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
    ) -> Iterator[tuple[str, Reply]]:
        """Send the requests of an exchange, and yield the replies in the order of `clients`.

        Args:
            schedule: Schedule of the round.
            collector: Collector that creates the requests.
            exchange: The exchange.
            clients: Ids of the clients that reply.

        Yields:
            Pairs of client id and reply.
        """
        return self.executor.run(clients, lambda client_id: collector.request(exchange, client_id))

    def time_record(self, start: float) -> dict[str, Any]:
        """Return the entries of the round's record for the start, the end and the tasks.

        The base class returns no entries.

        Args:
            start: Time at which the round began, in seconds.
        """
        return {}

    def task_record(self) -> dict[str, Any]:
        """Return the entries `counts` and `tasks` of the round's record.

        The count "invited" is the sum of the others.
        """
        counts = {
            "invited": len(self._schedule.tasks),
            "arrived": len(self._schedule.tasks) - len(self._late) - len(self._failed),
            "failed": len(self._failed),
            "late": len(self._late),
        }
        return {"counts": counts, "tasks": self._schedule.record(self._failed, self._late)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.now = state.get("now", 0.0)


class SimulatedTrainer(ScheduledTrainer):
    """Synchronous trainer in simulated time, in which tasks take time and may fail.

    The arguments are the same as those of `ScheduledTrainer`.
    """

    @override
    def run_tasks(self, collector: UploadCollector) -> Schedule:
        """Collect the uploads that arrive in time, and return the schedule of the tasks.

        Other uploads are not computed. If too few uploads would arrive in time, no upload is
        computed.
        """
        cohort = collector.cohort
        sizes = {client_id: self._sizes(client_id, len(cohort)) for client_id in cohort}
        schedule = make_schedule(
            cohort,
            self.environment,
            lambda client_id: total_bytes(sizes[client_id].values()),
            self._sampled_at,
            self.round_idx,
        )
        for client_id, reason in schedule.failed.items():
            collector.fail(client_id, reason)
        collector.late.extend(schedule.late)
        requested: Sequence[str] = ()
        if schedule.num_expected >= self.policy.least:
            requested = cohort if self.protocol.setup else schedule.computing
            self.exchange(schedule, collector, requested)
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
    ) -> Iterator[tuple[str, Reply]]:
        replies = super().replies(schedule, collector, exchange, clients)
        outcomes = {c: schedule.tasks[c].outcome for c in schedule.computing}
        has_faults = any(outcome.kind in ("twice", "corrupted") for outcome in outcomes.values())
        if exchange.kind != "train" or not has_faults:
            return replies
        return drop_duplicates(
            inject_faults(replies, outcomes, self.federation.seed, "changed", self.round_idx)
        )

    def _sizes(self, client_id: str, cohort_size: int) -> dict[str, tuple[int, int]]:
        """Return the expected bytes sent to and by a client, keyed by the kind of exchange."""
        client_info = self.federation.client_infos[client_id]
        payload = self.broadcast(client_info)
        upload = 0
        if not self.protocol.setup:
            upload = self.expectations.expected_size(client_info, payload, self.round_idx)
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
