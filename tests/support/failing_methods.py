"""Methods that fail for one client in the second round, after the dry run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from hetero_fl.algorithms import register_algorithm
from hetero_fl.core.payload import Item

FedAvg, Hybrid = register_algorithm["fedavg"], register_algorithm["hybrid"]


class Fails(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that raises while training one of the clients."""

    def train(self, client: Any, received: Any) -> Any:
        if client.participant_id == "site_1" and client.round_context.round_idx == 1:
            raise ZeroDivisionError("of all things")
        return (yield from super().train(client, received))


class Exits(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that calls sys.exit while training one of the clients."""

    def train(self, client: Any, received: Any) -> Any:
        if client.participant_id == "site_1" and client.round_context.round_idx == 1:
            sys.exit(3)
        return (yield from super().train(client, received))


class Leaves(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that ends the process at once."""

    def train(self, client: Any, received: Any) -> Any:
        if client.participant_id == "site_1" and client.round_context.round_idx == 1:
            os._exit(3)
        return (yield from super().train(client, received))


class SendsWrongItem(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging whose third client sends a wrong item.

    The server derives the expected form from what the first client of an architecture sends.
    """

    mistake: str = Field("", description="what is wrong with the item")

    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        if client.participant_id != "site_3" or client.round_context.round_idx != 1:
            return items
        tensors = dict(items["model"].values)
        if self.mistake == "undeclared":
            return {**items, "rows": torch.zeros(3)}
        if self.mistake == "not shared":
            tensors = client.models["model"]
        elif self.mistake == "shape":
            tensors = {name: tensor.flatten() for name, tensor in tensors.items()}
        elif self.mistake == "not finite":
            tensors = {name: tensor * float("nan") for name, tensor in tensors.items()}
        return {**items, "model": Item(tensors, items["model"].weight, "params")}


class Killed(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging whose process is killed, as on a machine without free memory."""

    is_killed: bool = Field(True, description="whether the process is killed")

    def train(self, client: Any, received: Any) -> Any:
        if self.is_killed and client.round_context.round_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from super().train(client, received))


class Waits(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that never ends; it creates the file `waiting` when it starts to wait."""

    def train(self, client: Any, received: Any) -> Any:
        if client.participant_id == "site_1" and client.round_context.round_idx == 1:
            Path("waiting").touch()
            time.sleep(1000)
        return (yield from super().train(client, received))


class WaitsOnce(Hybrid):  # type: ignore[misc,valid-type]
    """Hybrid that waits in its second round until its process is killed."""

    sign: str = Field(
        "", description="file with the number of a process that waits; none waits once it is there"
    )

    def train(self, client: Any, received: Any) -> Any:
        if client.round_context.round_idx >= 1 and not Path(self.sign).exists():
            written = Path(f"{self.sign}.{os.getpid()}")
            written.write_text(str(os.getpid()))
            written.replace(self.sign)
            time.sleep(10_000)
        return (yield from super().train(client, received))
