"""Synchronous rounds: broadcast, local training, aggregation."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from hetero_fl.communication.protocol import Traffic
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import UploadCollector
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.text import pluralize


class SynchronousTrainer(FederatedTrainer):
    """Trains in rounds that wait for their cohort (McMahan et al. 2017, Algorithm 1)."""

    def run_round(self) -> Record:
        started = time.perf_counter()
        before = replace(self.traffic)
        with self.rollback_on_error():
            self._set_round_context(self.round_idx)
            cohort = self.sample_cohort(self.round_idx)
            collector = self.collect(cohort)
            if collector.is_sufficient:
                collector.diverged = self.aggregate(collector)
            else:
                self.skip(collector)
            self.store.commit()
        self.completed += 1
        traffic = Traffic(self.traffic.up - before.up, self.traffic.down - before.down)
        return collector.record(traffic, time.perf_counter() - started)

    def sample_cohort(self, round_idx: int) -> list[str]:
        """Return the clients of a round, in order: all, or `per_round` drawn by the key."""
        return self.federation.sample_cohort(self.per_round, round_idx)

    def collect(self, cohort: list[str]) -> UploadCollector:
        """Broadcast to the cohort, have it train, and collect what comes back."""
        collector = UploadCollector(self, cohort)
        for exchange in collector.exchanges():
            requests = partial(collector.request, exchange)
            for client_id, reply in self.executor.run(exchange.clients, requests):
                collector.add(exchange, client_id, reply)
                del reply  # free the upload before the next client trains
        self.count_traffic(collector.up_bytes, collector.down_bytes)
        return collector

    def aggregate(self, collector: UploadCollector) -> str:
        """Aggregate the uploads; return why the server diverged, if it did."""

        def aggregate() -> None:
            if collector.rules is not None:
                scratch = replace(self.server, models=dict(self.server.models), stream_uses={})
                run_plan(collector.uploads.prepare(scratch), scratch, self.backend)
            plan = self.algorithm.aggregate(self.server, collector.uploads)
            run_plan(plan, self.server, self.backend)
            if self.privacy is not None:
                self.privacy.adapt_bounds(collector.uploads)

        diverged = self.update_server(aggregate, collector.magnitudes)
        if diverged:
            self.store.discard()
        return diverged

    def skip(self, collector: UploadCollector, attempts: int = 1) -> None:
        """Leave server and clients as they were, if that is the policy for too few uploads.

        Raises:
            RunFailedError: If it is not.
        """
        if self.on_too_few == "skip":
            self.store.discard()
            return
        if collector.abandoned is not None:
            raise collector.abandoned
        least = self.policy.least
        found = f"{len(collector.uploads)} of at least {least} usable uploads"
        line = f"round {self.completed + 1}: {found if least > 1 else 'no usable upload'}"
        line += f" from {pluralize(len(collector.cohort), 'client')}"
        if attempts > 1:
            line += f", {attempts} times"
        if collector.failed:
            client_id, reason = next(iter(collector.failed.items()))
            line += f"; {client_id}: {reason}"
        elif collector.late:
            line += f"; {len(collector.late)} of them late"
        raise RunFailedError(line)

    @property
    def on_too_few(self) -> str:
        """What happens to a round with too few uploads: "repeat", "skip" or "fail"."""
        return str(self.policy.too_few or "fail")


def task_number(round_idx: int, attempt: int) -> int:
    """Return the number of the tasks of one attempt at a round; the round's own for the first."""
    return attempt << 32 | round_idx
