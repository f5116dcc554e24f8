"""Upload memory: bytes are freed before aggregation and before the next upload is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from hetero_fl.aggregation import Uploads
from hetero_fl.algorithms import FedAvg
from hetero_fl.communication.protocol import Message
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.payload import Payload
from hetero_fl.federation.executors.base import InProcessExecutor
from hetero_fl.federation.upload_collector import UploadCollector
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import encode
from tests.support.cases import each_case
from tests.support.federations import MIXED, broadcasts, config, rounds_of

alive: list[int] = []


class Body(bytes):
    """Bytes that record when they are freed."""

    def __del__(self) -> None:
        alive.remove(id(self))


def test_uploads_are_freed_after_aggregation_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config(models="mlp", clients=5), num_rounds=0)
    answer, add = rounds.executor.run, Uploads.add
    seen = {"made": [], "added": []}

    def tracked(clients: list[str], request: Any) -> Iterator[tuple[str, Any]]:
        for client in clients:
            seen["made"].append(len(alive))
            ((_, reply),) = answer([client], request)
            body = Body(reply.body)
            alive.append(id(body))
            replies = [Message(reply.kind, body)]
            del body, reply
            yield client, replies.pop()

    def adding(self: Uploads, upload: Any) -> None:
        seen["added"].append(len(alive))
        add(self, upload)

    monkeypatch.setattr(rounds.executor, "run", tracked)
    monkeypatch.setattr(Uploads, "add", adding)
    rounds.run_round()
    # While an upload is added, only its encoded form exists.
    assert seen == {"made": [0] * 5, "added": [1] * 5}


def test_executor_frees_returned_uploads() -> None:
    rounds = rounds_of(config(models="mlp", clients=4), num_rounds=0)
    rounds.executor.chunk = 4  # type: ignore[attr-defined]
    site = rounds.executor.runtime  # type: ignore[attr-defined]
    answer, handed = site.run, []

    def kept(*args: Any) -> Any:
        handed.append(answer(*args))
        return handed[-1]

    site.run = kept
    left = [len(handed[0]) for _ in rounds.executor.run(*requests(rounds))]
    assert left == [3, 2, 1, 0]


def requests(rounds: Any) -> tuple[list[str], Callable[[str], Message]]:
    bodies = broadcasts(rounds, rounds.sample_cohort(0))
    return list(bodies), lambda client: Message("train", bodies[client])


def test_repeated_round_keeps_uploads_of_one_attempt() -> None:
    faults = {"after": 0.99}
    cohort = {"too_few": "repeat", "least": 3, "attempts": 3}
    rounds = rounds_of(
        config(models="linear", faults=faults, cohort=cohort, devices={}), num_rounds=0
    )
    collectors: list[weakref.ref[UploadCollector]] = []
    attempt = rounds.collect_attempt  # type: ignore[attr-defined]

    def watched(*args: Any) -> UploadCollector:
        assert not any(collector() for collector in collectors)
        collectors.append(weakref.ref(result := attempt(*args)))
        return result

    rounds.collect_attempt = watched  # type: ignore[attr-defined]

    with pytest.raises(RunFailedError):
        rounds.run_round()
    assert len(collectors) == 3


@each_case("method", ["fedavg", "hybrid", "fedproto", "scaffold"])
def test_passed_payload_equals_its_bytes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = config(method, MIXED if method in ("hybrid", "fedproto") else "mlp", 3)
    records = []
    for skips_encoding in (True, False):
        monkeypatch.setattr(InProcessExecutor, "accepts_unencoded", skips_encoding)
        trainer = rounds_of(source, num_rounds=0)
        runtime = trainer.executor.runtime  # type: ignore[attr-defined]
        assert runtime.skips_encoding and trainer.skips_encoding == skips_encoding
        runtime.skips_encoding = skips_encoding
        records.append([trainer.run_round() for _ in range(2)])
        for record in records[-1]:
            del record["seconds"]
        records[-1].append(trainer.evaluate())
        records[-1].append(encode(trainer.state_dict(), "x"))
    assert records[0] == records[1]


class OwnMethod(FedAvg):
    """FedAvg as a user-defined method."""


class OwnObjective(Supervised):
    """The supervised loss as a user-defined objective."""


def test_messages_are_encoded_only_if_needed() -> None:
    own = config(f"python:{__name__}:OwnMethod", "mlp", 2)
    objective = config(
        "fedavg", "mlp", 2, clients__defaults__objective=f"python:{__name__}:OwnObjective"
    )
    compressed = config("fedavg", "mlp", 2, channel={"compress": ["half"]})
    compressed_down = config("fedavg", "mlp", 2, channel={"compress_down": ["half"]})
    summed = config("fedavg", "mlp", 3, channel={"secure_sum": {"threshold": 2}})
    for source, down, up in (
        (config("fedavg", "mlp", 2), Payload, Payload),
        (own, bytes, bytes),
        (objective, bytes, bytes),
        (compressed, Payload, bytes),
        (compressed_down, bytes, Payload),
        (summed, bytes, bytes),
    ):
        trainer = rounds_of(source, num_rounds=0)
        kinds: set[tuple[type, type]] = set()
        run = trainer.executor.run

        def watched(
            clients: Sequence[str],
            request: Callable[[str], Message],
            run: Any = run,
            kinds: set[tuple[type, type]] = kinds,
        ) -> Any:
            sent = {}

            def watched_request(client_id: str) -> Message:
                sent[client_id] = request(client_id)
                return sent[client_id]

            for client_id, reply in run(clients, watched_request):
                kinds.add((type(sent[client_id].content), type(reply.content)))
                yield client_id, reply

        trainer.executor.run = watched  # type: ignore[method-assign]
        assert not trainer.run_round()["failed"]
        assert kinds == {(down, up)}
