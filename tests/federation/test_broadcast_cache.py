"""A broadcast is decoded once for all that read it, and nothing passes from one reader to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.algorithms import FedAvg
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Item, Payload
from hetero_fl.core.plan import Plan
from hetero_fl.federation.client_runtime import MOST, BroadcastCache
from tests.helpers.small_federations import MIXED, broadcasts, config, rounds_of

BODIES = [
    Payload(
        {
            "model": Item({"w": torch.full((3,), float(i))}, kind="params"),
            "rows": Item(torch.ones(2, 2), torch.ones(2, 1)),
        }
    ).encode()
    for i in range(MOST + 2)
]


class Counted:
    """Decodes, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, client: str, round: int, body: bytes) -> Payload:
        self.times += 1
        return Payload.decode(body)


@pytest.fixture
def decode() -> Counted:
    return Counted()


def read(lent: BroadcastCache, body: bytes, round: int = 0) -> Payload:
    """What one client is given, that has given it back."""
    with lent.get_copies({"a": body}, round) as got:
        return got["a"]


def test_the_same_message_is_decoded_once_and_another_anew(decode: Counted) -> None:
    lent = BroadcastCache(decode)
    first, second = read(lent, BODIES[0]), read(lent, BODIES[0])
    assert decode.times == 1 and first["model"]["w"] is second["model"]["w"]
    assert read(lent, BODIES[1])["model"]["w"].tolist() == [1.0] * 3 and decode.times == 2
    # compressed, the same bytes would say something else in another round
    read(lent, BODIES[0], round=1)
    assert decode.times == 3
    read(lent, BODIES[0])  # what was kept of another round is gone
    assert decode.times == 4


def test_two_clients_at_a_time_never_hold_one_tensor(decode: Counted) -> None:
    lent = BroadcastCache(decode)
    read(lent, BODIES[0])
    with lent.get_copies({"a": BODIES[0], "b": BODIES[0]}, 0) as got:
        got["a"]["model"]["w"].add_(1)
        assert got["b"]["model"]["w"].tolist() == [0.0] * 3


@pytest.mark.parametrize("where", ["values", "rows", "weight", "view"])
def test_what_was_changed_in_place_is_not_lent_again(decode: Counted, where: str) -> None:
    lent = BroadcastCache(decode)
    got = read(lent, BODIES[0])
    item = got.item("rows")
    touched: dict[str, Any] = {
        "values": got["model"]["w"],
        "rows": item.values,
        "weight": item.weight,
    }
    with lent.get_copies({"a": BODIES[0]}, 0):
        touched.get(where, got["model"]["w"][:1]).add_(1)
    again = read(lent, BODIES[0])
    assert decode.times == 2 and again["model"]["w"].tolist() == [0.0] * 3
    read(lent, BODIES[0])["model"]["w"].add_(1)  # after it was given back
    assert read(lent, BODIES[0])["model"]["w"].tolist() == [0.0] * 3


def test_dictionaries_are_each_readers_own(decode: Counted) -> None:
    lent = BroadcastCache(decode)
    got = read(lent, BODIES[0])
    got["model"]["w"] = torch.full((3,), 9.0)
    del got.items_["rows"]
    got.report["more"] = 1
    again = read(lent, BODIES[0])
    assert (
        set(again) == {"model", "rows"}
        and again["model"]["w"].tolist() == [0.0] * 3
        and not again.report
    )


def test_no_more_than_so_many_are_kept(decode: Counted) -> None:
    lent = BroadcastCache(decode)
    for body in BODIES:
        read(lent, body)
    assert len(lent._idle) == MOST


class Spoiling(FedAvg):
    """Its clients change what they received, in place, before they are read."""

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        for tensor in received["model"].values():
            if tensor.is_floating_point():
                tensor.mul_(0.5)
        client.load("model", received["model"])
        yield from ()


@pytest.mark.parametrize("chunk", [1, 6])
def test_clients_that_spoil_what_they_received_spoil_nobody_elses(chunk: int) -> None:
    losses: list[dict[str, Any]] = []
    for alone in (True, False):
        rounds = rounds_of(config("fedavg", MIXED, clients=6), held=1)
        rounds.algorithm = rounds.executor.runtime.algorithm = Spoiling()  # type: ignore[attr-defined]
        site = rounds.executor.runtime  # type: ignore[attr-defined]
        bodies = broadcasts(rounds, list(rounds.federation.client_infos), for_evaluation=True)
        ids = list(bodies)
        groups = (
            [[id] for id in ids]
            if alone
            else [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
        )
        found: dict[str, Any] = {}
        for group in groups:
            if alone:
                site.broadcast_cache._idle.clear()
            found |= {
                c: r.scores for c, r in site.evaluate({c: bodies[c] for c in group}, 1).items()
            }
        losses.append(found)
    assert losses[0] == losses[1]


class Unseen(FedAvg):
    """A user's own, whose clients change what they received where no version tells of it."""

    def personalize(self, client: Participant, received: Payload) -> Plan[None]:
        for tensor in received["model"].values():
            tensor.data.mul_(0.5)
            tensor.numpy()[...] += 1
        client.load("model", received["model"])
        yield from ()


def test_a_method_of_the_users_own_may_write_where_no_version_tells(decode: Counted) -> None:
    rounds = rounds_of(config(f"python:{__name__}:Unseen", MIXED, clients=6), held=1)
    site = rounds.executor.runtime  # type: ignore[attr-defined]
    (first, body), *_ = broadcasts(
        rounds, list(rounds.federation.client_infos), for_evaluation=True
    ).items()
    want = Payload.decode(body)
    site.evaluate({first: body}, 1)
    with site.broadcast_cache.get_copies({first: body}, 1) as got:
        assert all(torch.equal(t, want["model"][n]) for n, t in got[first]["model"].items())
    lent = BroadcastCache(decode, 0)
    read(lent, BODIES[0])["model"]["w"].data.add_(1)
    assert read(lent, BODIES[0])["model"]["w"].tolist() == [0.0] * 3 and decode.times == 2
