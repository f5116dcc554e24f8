"""A method that fails on one client: workers tell it as a run in one process does."""

from __future__ import annotations

from typing import Any

from hetero_fl.algorithms import algorithm

FedAvg = algorithm["fedavg"]


class Fails(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that cannot train one of the clients."""

    def train(self, client: Any, got: Any) -> Any:
        if client.id == "site_1" and client.clock.round == 1:  # not when it is tried out before the run
            raise ZeroDivisionError("of all things")
        return (yield from super().train(client, got))


class Leaves(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that ends the process."""

    def train(self, client: Any, got: Any) -> Any:
        if client.id == "site_1" and client.clock.round == 1:  # not when it is tried out before the run
            raise SystemExit(3)
        return (yield from super().train(client, got))
