"""Uploads: compression, the memory that they take, their description and their expected form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.aggregation import Uploads
from hetero_fl.algorithms import FedAvg
from hetero_fl.cli import main
from hetero_fl.communication.compressor import UNSENT
from hetero_fl.communication.protocol import Message
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.payload import Item, Payload
from hetero_fl.experiment import prepare
from hetero_fl.federation.cost import UploadContent, _group_tensors, expected_cost, upload_contents
from hetero_fl.federation.executors.base import Arrival, InProcessExecutor
from hetero_fl.federation.expected import ExpectedUploads
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import encode
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.deployments import small
from tests.support.federations import (
    MIXED,
    TOP,
    broadcasts,
    config,
    rounds_of,
    runtime_of,
    same_bits,
)

MODELS = ["cnn_bn_small", {"name": "mlp", "hidden": [24]}]


def test_cost_is_an_upper_bound_for_value_dependent_sizes() -> None:
    prepared = prepare(config("fedavg", MODELS, 4, channel=TOP))
    rounds = prepared.make_trainer()
    for _ in range(2):
        rounds.run_round()
    cost = expected_cost(prepared.method, prepared.federation, 2)
    assert cost.is_upper_bound
    assert (
        0.8 * cost.up.total() < rounds.traffic.up <= cost.up.total()
        and rounds.traffic.down <= cost.down.total()
    )


@each_case("empty", [{}, {"channel": {}}, {"channel": {"compress": []}}])
def test_empty_chain_changes_nothing(empty: dict[str, Any]) -> None:
    rounds = rounds_of(config("hybrid", MODELS, 4, **empty), num_rounds=0)
    bodies = dict(broadcasts(rounds, rounds.sample_cohort(0)))
    assert all(Payload.decode(body).encode() == body for body in bodies.values())
    rounds.run_round()
    assert not any(UNSENT in rounds.store.get(c).state for c in rounds.federation.client_infos)


def test_batch_norm_statistics_are_not_compressed() -> None:
    plain, cut = (
        rounds_of(config("fedavg", "cnn_bn_small", 1, **c), num_rounds=1)
        for c in ({}, {"channel": TOP})
    )
    (group,) = plain.server.models
    names = [n for n in plain.server.models[group] if "running" in n]
    for n in names:
        assert torch.equal(plain.server.models[group][n], cut.server.models[group][n])
    weights = plain.server.arch[group].parameter_names
    assert names and not any(
        torch.equal(plain.server.models[group][n], cut.server.models[group][n]) for n in weights
    )


def test_random_selection_is_decoded_at_its_positions() -> None:
    source = config("fedavg", {"name": "mlp", "hidden": [24]}, 1)
    start = rounds_of(source, num_rounds=0).server.models
    dense, cut = (
        rounds_of(source, num_rounds=1),
        rounds_of({**source, "channel": {"compress": [{"randk": 0.25}]}}, num_rounds=1),
    )
    (group,) = start
    count = 0
    for n, t in dense.server.models[group].items():
        came = cut.server.models[group][n] - start[group][n]
        assert torch.allclose(
            came[came != 0], 4 * (t - start[group][n])[came != 0], rtol=1e-2, atol=1e-6
        )
        count += int((came != 0).sum())
    total = sum(t.numel() for t in start[group].values())
    assert 0.2 * total < count <= -(-total // 4)


def kept_by(rounds: Any) -> dict[str, Any]:
    return {
        c: rounds.store.get(c).state.get(UNSENT, {}).get("model")
        for c in rounds.federation.client_infos
    }


def test_residual_survives_absence_and_refused_uploads() -> None:
    rounds = rounds_of(config("fedavg", MODELS, 4, clients__per_round=3, channel=TOP), num_rounds=2)
    for _ in range(4):
        before, absent = (
            kept_by(rounds),
            set(rounds.federation.client_infos) - set(rounds.sample_cohort(rounds.completed)),
        )
        (lost, *others), receive = (
            rounds.sample_cohort(rounds.completed),
            rounds.link.decode_upload,
        )

        def refusing(
            client: Any, data: bytes, *rest: Any, lost: str = lost, receive: Any = receive
        ) -> Payload:
            return receive(client, data[:-1] if client.client_id == lost else data, *rest)

        rounds.link.decode_upload = refusing  # type: ignore[method-assign]
        assert set(rounds.run_round()["failed"]) == {lost}
        rounds.link.decode_upload = receive  # type: ignore[method-assign]
        after = kept_by(rounds)
        for client in (*absent, lost):
            assert (before[client] is None) == (after[client] is None)
            assert before[client] is None or same_bits(before[client], after[client])
        assert all(before[c] is None or not same_bits(before[c], after[c]) for c in others)


def test_clients_of_a_group_receive_the_same_broadcast() -> None:
    source = config("fedavg", MODELS, 4, channel={"compress_down": [{"quantize": 4}]})
    rounds = rounds_of(source, num_rounds=0)
    bodies = dict(broadcasts(rounds, rounds.sample_cohort(0)))
    assert len(set(bodies.values())) == 2
    for client, body in bodies.items():
        client_info = rounds.federation.client_infos[client]
        got = rounds.link.channel.decode_broadcast(0, body)["model"]
        received = rounds.link.received_by(client_info)["model"]
        assert same_bits(got, received)
        weight = next(n for n, t in got.items() if t.ndim > 1)
        assert (
            len(got[weight].unique())
            <= 15
            < len(rounds.server.models[client_info.arch.spec_id][weight].unique())
        )


alive: list[int] = []


class Body(bytes):
    """Bytes that record when they are freed."""

    def __del__(self) -> None:
        alive.remove(id(self))


def test_uploads_are_freed_after_aggregation_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config(models="mlp", clients=5), num_rounds=0)
    answer, made = rounds.executor.run, list[int]()

    def tracked(clients: list[str], request: Any, until: Any) -> Iterator[Arrival]:
        for client in clients:
            made.append(len(alive))
            (arrival,) = answer([client], request)
            body = Body(arrival.reply.body)
            alive.append(id(body))
            replies = [Message(arrival.reply.kind, body)]
            del body, arrival
            yield Arrival(client, replies.pop())

    monkeypatch.setattr(rounds.executor, "run", tracked)
    added = record_calls(monkeypatch, Uploads, "add", lambda *_: len(alive))
    rounds.run_round()
    # While an upload is added, only its encoded form exists.
    assert (made, added) == ([0] * 5, [1] * 5)


def test_executor_frees_returned_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = rounds_of(config(models="mlp", clients=4), num_rounds=0)
    rounds.executor.chunk = 4  # type: ignore[attr-defined]
    runtime = runtime_of(rounds)
    plain, replies = runtime.run, list[Any]()

    def run(*arguments: Any) -> dict[str, Any]:
        found = plain(*arguments)
        replies.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(runtime, "run", run)

    # The one that is returned, and those after it.
    left = [sum(r() is not None for r in replies) for _ in rounds.executor.run(*requests(rounds))]
    assert left == [4, 3, 2, 1]


def requests(rounds: Any) -> tuple[list[str], Callable[[str], Message]]:
    bodies = broadcasts(rounds, rounds.sample_cohort(0))
    return list(bodies), lambda client: Message("train", bodies[client])


@each_case("method", ["fedavg", "hybrid", "fedproto", "scaffold"])
def test_passed_payload_equals_its_bytes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = config(method, MIXED if method in ("hybrid", "fedproto") else "mlp", 3)
    records = []
    for skips_encoding in (True, False):
        monkeypatch.setattr(InProcessExecutor, "accepts_unencoded", skips_encoding)
        trainer = rounds_of(source, num_rounds=0)
        runtime = trainer.executor.runtime  # type: ignore[attr-defined]
        assert runtime.skips_encoding and trainer.link.skips_encoding == skips_encoding
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
            until: Any,
            run: Any = run,
            kinds: set[tuple[type, type]] = kinds,
        ) -> Any:
            sent = {}

            def watched_request(client_id: str) -> Message:
                sent[client_id] = request(client_id)
                return sent[client_id]

            for arrival in run(clients, watched_request):
                kinds.add((type(sent[arrival.client].content), type(arrival.reply.content)))
                yield arrival

        trainer.executor.run = watched  # type: ignore[method-assign]
        assert not trainer.run_round()["failed"]
        assert kinds == {(down, up)}


def contents(max_parts: int = 10, **source: Any) -> list[UploadContent]:
    prepared = prepare({"data": {"name": "digits"}, **source})
    return upload_contents(prepared.method, prepared.federation, max_parts)


MLP = {"groups": [{"name": "a", "count": 2, "model": "mlp"}]}


TWO_MODELS = {
    "groups": [{"name": "a", "count": 2, "model": "mlp"}, {"name": "b", "model": "linear"}]
}


def test_upload_contents_lists_each_shared_tensor() -> None:
    (content,) = contents(clients=MLP, algorithm={"name": "fedavg"})

    assert content.clients == ("a_1",) and content.num_clients == 2
    prepared = prepare({"data": {"name": "digits"}, "clients": MLP})
    arch = prepared.federation.client_infos["a_1"].arch
    assert [part.name for part in content.parts] == list(arch.shapes)
    assert [part.shapes for part in content.parts] == [(s,) for s in arch.shapes.values()]
    assert all(part.num_bytes == 4 * part.num_values for part in content.parts)


@each_case("max_parts", [1, 2, 3])
def test_upload_contents_groups_tensors_by_layer(max_parts: int) -> None:
    (whole,) = contents(100, clients=MLP)
    (grouped,) = contents(max_parts, clients=MLP)

    assert len(grouped.parts) <= max_parts < len(whole.parts)
    for attribute in ("num_values", "num_bytes"):
        totals = {
            sum(getattr(part, attribute) for part in content.parts) for content in (whole, grouped)
        }
        assert len(totals) == 1
    assert [s for part in grouped.parts for s in part.shapes] == [
        s for part in whole.parts for s in part.shapes
    ]
    for part in grouped.parts:
        assert part.name in ("", "backbone.", "head.") or part.name.count(".") > 0


def test_single_tensor_of_a_part_keeps_its_name() -> None:
    names = ("backbone.items.weight", "head.weight", "head.bias")
    model = Item({name: torch.zeros(2) for name in names}, kind="params")

    parts = _group_tensors({"model": model}, max_parts=2)

    assert [part.name for part in parts] == ["backbone.items.weight", "head."]


def test_upload_contents_differ_by_architecture_and_share() -> None:
    defaults = {"shares": ["backbone", "predictions"]}
    private = {"groups": TWO_MODELS["groups"], "defaults": defaults}
    mlp, linear = contents(
        clients=private,
        algorithm={"name": "hybrid"},
        data={"name": "digits", "proxy": {"size": 50}},
    )

    assert mlp.clients == ("a_1",) and linear.clients == ("b",)
    assert not any("head." in part.name for part in mlp.parts)
    assert {part.item for part in linear.parts} >= {"logits"}
    assert [part.shapes for part in mlp.parts if part.item == "logits"] == [((50, 10),)]


@each_case(
    ("method", "words"),
    [("fedavg", ("content of an upload", "head.weight", "sum")), ("local", ("nothing",))],
)
def test_check_prints_the_content_of_uploads(
    method: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {name: digits}\nclients: {groups: [{name: a, model: linear}]}\n")

    assert main(["train", "--check", "-c", str(file), f"algorithm.name={method}"]) == 0

    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


@pytest.fixture(scope="module")
def fedgkt() -> Any:
    """Return FedGKT, whose clients upload features of their training rows."""
    return prepare(small("fedgkt", "cnn_gn_small", rounds=1))


def test_expected_rows_allocate_no_memory(fedgkt: Any) -> None:
    expectations = ExpectedUploads(fedgkt.method, fedgkt.federation)
    client_info = replace(fedgkt.federation.client_infos["site_1"], num_rows=2**40)

    items = expectations.expected_items(client_info, Payload({}), 0)

    assert {name: len(item.values) for name, item in items.items()} == dict.fromkeys(items, 2**40)
    assert all(item.values.untyped_storage().nbytes() <= 8 for item in items.values())


def test_rows_without_memory_are_refused(fedgkt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*given: Any) -> None:
        torch.empty(2**50)

    expectations = ExpectedUploads(fedgkt.method, fedgkt.federation)
    client_info = replace(fedgkt.federation.client_infos["site_1"], num_rows=2**31)
    monkeypatch.setattr(expectations, "dry_run_upload", allocate)

    with pytest.raises(
        UserError, match="site_1: not enough memory for an upload of 2,147,483,648 rows"
    ):
        expectations.expected_items(client_info, Payload({}), 0)
