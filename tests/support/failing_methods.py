"""Methods that fail for one client in the second round, after the dry run."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hetero_fl.algorithms import register_algorithm
from hetero_fl.core.payload import Item

FedAvg, Hybrid = register_algorithm["fedavg"], register_algorithm["hybrid"]


class Fails(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that raises while training one of the clients."""

    def fail(self) -> None:
        raise ZeroDivisionError("of all things")

    def train(self, client: Any, received: Any) -> Any:
        if client.participant_id == "site_1" and client.round_context.round_idx == 1:
            self.fail()
        return (yield from super().train(client, received))


class Exits(Fails):
    """Federated averaging that calls sys.exit while training one of the clients."""

    def fail(self) -> None:
        sys.exit(3)


class Leaves(Fails):
    """Federated averaging that ends the process at once."""

    def fail(self) -> None:
        os._exit(3)


def _changed(item: Item, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an upload with changed tensors."""
    return {"model": replace(item, values={n: change(t) for n, t in item.tensors.items()})}


WRONG_UPLOADS: dict[str, Callable[[Item, Any], dict[str, Any]]] = {
    "undeclared": lambda item, _: {"model": item, "rows": torch.zeros(3)},
    "missing": lambda *_: {},
    "not shared": lambda item, client: {"model": replace(item, values=client.models["model"])},
    "shape": lambda item, _: _changed(item, torch.flatten),
    "dtype": lambda item, _: _changed(item, Tensor.double),
    "not finite": lambda item, _: _changed(item, lambda tensor: tensor * float("nan")),
    "weight": lambda item, client: {"model": replace(item, weight=10.0 * client.num_rows)},
}
"""Wrong uploads by mistake, given the right item and the client."""


class SendsWrongItem(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging whose third client sends a wrong item.

    The server derives the expected form from what the first client of an architecture sends.
    """

    mistake: str = Field("", description="what is wrong with the item")

    def train(self, client: Any, received: Any) -> Any:
        items = yield from super().train(client, received)
        is_right = client.participant_id != "site_3" or client.round_context.round_idx != 1
        return items if is_right else WRONG_UPLOADS[self.mistake](items["model"], client)


class Killed(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging whose process is killed, as on a machine without free memory."""

    is_killed: bool = Field(True, description="whether the process is killed")

    def train(self, client: Any, received: Any) -> Any:
        if self.is_killed and client.round_context.round_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from super().train(client, received))


class Warns(FedAvg):  # type: ignore[misc,valid-type]
    """Federated averaging that issues a warning in the second round."""

    def train(self, client: Any, received: Any) -> Any:
        if client.round_context.round_idx == 1:
            warnings.warn("few rows", stacklevel=1)
        return (yield from super().train(client, received))


class Waits(Fails):
    """Federated averaging that never ends; it creates the file `waiting` when it starts to wait."""

    def fail(self) -> None:
        Path("waiting").touch()
        time.sleep(1000)


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
