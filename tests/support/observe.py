"""Watch a run: what is sent, which shared tensors change, and what rounds leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hetero_fl.communication.protocol import content_size
from hetero_fl.core.participant import copy_containers
from hetero_fl.core.payload import Payload
from hetero_fl.experiment import prepare
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.cost import ExpectedCost, expected_cost
from hetero_fl.federation.executors.base import InProcessExecutor
from hetero_fl.federation.trainer import FederatedTrainer, add_evaluation
from hetero_fl.utils.serialization import encode


@dataclass
class Facts:
    """What was observed of a run.

    Attributes:
        records: The records of the rounds, with the scores of the evaluations.
        uploaded: Bytes of the encoded uploads.
        items: Names and kinds of the items of uploads.
        counted: Uploaded and downloaded bytes that the run counts.
        cost: The cost that is estimated without training.
        changed_in_place: Descriptions of shared tensors that a hook of the method has changed.
        trainer: The trainer after the last round.
    """

    trainer: FederatedTrainer
    cost: ExpectedCost
    records: list[dict[str, Any]] = field(default_factory=list)
    uploaded: int = 0
    items: set[tuple[str, str]] = field(default_factory=set)
    counted: tuple[int, int] = (0, 0)
    changed_in_place: list[str] = field(default_factory=list)

    @property
    def estimated(self) -> tuple[int, int]:
        """Estimated bytes of uploads, and of broadcasts for training and evaluation."""
        return self.cost.up.total(), self.cost.down.total() + self.cost.evaluation.total()


def observe(source: Mapping[str, Any], chunk: int = 1) -> Facts:
    """Run all rounds of a configuration in this process, with an evaluation after each.

    Args:
        source: The configuration.
        chunk: Number of clients of one architecture that are processed together.
    """
    torch.set_num_threads(1)
    prepared = prepare(dict(source))
    settings = prepared.config
    trainer = prepared.make_trainer()
    computing = getattr(trainer.executor, "inner", trainer.executor)
    assert isinstance(computing, InProcessExecutor)
    computing.chunk = chunk
    cost = expected_cost(
        prepared.method, prepared.federation, settings.rounds, settings.clients.per_round
    )
    facts = Facts(trainer, cost)
    with _watched(facts):
        for _ in range(settings.rounds):
            server = copy_containers([trainer.server.models, trainer.server.state])
            before = encode(server, "server")
            record = trainer.run_round()
            if encode(server, "server") != before:
                facts.changed_in_place.append(f"state of the server in round {record['round']}")
            add_evaluation(record, trainer.evaluate())
            facts.records.append(record)
    facts.counted = (trainer.traffic.up, trainer.traffic.down)
    return facts


@contextmanager
def _watched(facts: Facts) -> Iterator[None]:
    """Count the bytes of uploads, and compare broadcasts that clients share at the end."""
    shared: list[tuple[str, Tensor, Tensor]] = []
    decode, receive = facts.trainer.link.decode_upload, ClientRuntime.receive

    def decode_upload(client: Any, content: Any, *rest: Any) -> Payload:
        facts.uploaded += content_size(content)
        payload = decode(client, content, *rest)
        facts.items |= {(name, item.kind) for name, item in payload.items_by_name.items()}
        return payload

    def get_broadcast(*args: Any) -> Payload:
        received = receive(*args)
        for name, item in received.items_by_name.items():
            weight = [item.weight] if isinstance(item.weight, Tensor) else []
            shared.extend((name, t, t.clone()) for t in [*item.tensors.values(), *weight])
        return received

    with (
        mock.patch.object(facts.trainer.link, "decode_upload", decode_upload),
        mock.patch.object(ClientRuntime, "receive", get_broadcast),
    ):
        yield
    facts.changed_in_place += sorted(
        {f"received item {name}" for name, now, before in shared if not torch.equal(now, before)}
    )
