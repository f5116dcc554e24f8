"""Trainer of synchronous rounds."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

from typing_extensions import override

from hetero_fl.communication.protocol import Traffic
from hetero_fl.engine.driver import run_plan
from hetero_fl.federation.trainer import FederatedTrainer, Record
from hetero_fl.federation.upload_collector import UploadCollector


class SynchronousTrainer(FederatedTrainer):
    """Trainer that runs synchronous rounds (McMahan et al. 2017, Algorithm 1).

    In each round, the server samples a cohort, sends the broadcast, waits for the uploads of the
    cohort and aggregates the uploads.
    """

    @override
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
                self.abandon_round(collector)
            self.store.commit()
        self.completed += 1
        traffic = Traffic(self.traffic.up - before.up, self.traffic.down - before.down)
        return collector.record(traffic, time.perf_counter() - started)

    def sample_cohort(self, round_idx: int) -> list[str]:
        """Sample the clients of a round.

        Returns:
            Client ids in natural order. If `per_round` is None, the ids of all clients.
        """
        return self.federation.sample_cohort(self.per_round, round_idx)

    def collect(self, cohort: list[str]) -> UploadCollector:
        """Send the broadcast to the cohort and collect the uploads."""
        collector = UploadCollector(self, cohort)
        for exchange in collector.exchanges():
            requests = partial(collector.request, exchange)
            for client_id, reply in self.executor.run(exchange.clients, requests):
                collector.add(exchange, client_id, reply)
                # Free the upload before the next client trains.
                del reply
        collector.finish()
        self.count_traffic(collector.up_bytes, collector.down_bytes)
        return collector

    def aggregate(self, collector: UploadCollector) -> str:
        """Aggregate the uploads, and update the server.

        If training at the server diverges, the server and the private states of the clients are
        restored.

        Returns:
            Reason why training at the server diverged. Empty if training did not diverge.
        """
        diverged = self.update_server(
            partial(self._run_aggregation, collector), collector.magnitudes
        )
        if diverged:
            self.store.discard()
        return diverged

    def _run_aggregation(self, collector: UploadCollector) -> None:
        """Update the server and the privacy bounds.

        Raises:
            DivergedError: If training at the server diverges.
        """
        if collector.sealed is not None:
            self.adopt_state(collector.sealed)
            return
        plan = self.algorithm.aggregate(self.server, collector.uploads)
        run_plan(self.server, plan, self.backend)
        if self.privacy is not None:
            self.privacy.adapt_bounds(collector.uploads)

    def abandon_round(self, collector: UploadCollector) -> None:
        """Discard the private states of a round with too few uploads.

        Raises:
            RunFailedError: If `on_too_few` is not "skip".
        """
        if self.on_too_few != "skip":
            raise collector.shortage()
        self.store.discard()

    @property
    def on_too_few(self) -> str:
        """Policy for rounds with too few uploads, such as "skip" or "fail"."""
        return str(self.policy.too_few or "fail")
