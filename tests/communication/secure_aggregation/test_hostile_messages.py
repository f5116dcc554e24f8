"""Hostile messages are refused, reveal no second secret of a client, and cause no crash."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest

from hetero_fl.communication.named_arrays import decode_arrays, encode_arrays
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.client import (
    KEYS,
    REPLIES,
    REQUESTS,
    survivors_statement,
)
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.seeding import stream_key
from tests.support.cases import each_case
from tests.support.secure_aggregation import EXCHANGES, Party, replacing

Arrays = dict[str, np.ndarray]


def changed(
    message: Message, fields: dict[str, dict[str, tuple]], change: Callable[[Arrays], None]
) -> Message:
    """Return the message with changed content."""
    arrays = decode_arrays(message.body, fields[message.kind])
    change(arrays)
    return Message(message.kind, encode_arrays(arrays))


def before(kind: str, leaves: dict[str, str] | None = None) -> tuple[Party, dict[str, Message]]:
    """Return a cohort that has answered all exchanges before `kind`, and the honest requests."""
    party, requests = Party(5), {}

    def stop(client: str, message: Message) -> Message | None:
        if message.kind != kind:
            return message
        requests[client] = message
        return None

    with pytest.raises(RunFailedError):
        party.run_round(leaves, down=stop)
    return party, requests


def refusal(party: Party, client: str, message: Message) -> str:
    """Return the reason why the client refuses."""
    reply = party.reply(client, message)
    assert reply.kind == "refused", reply
    return reply.body.decode()


def numbers(*them: int) -> np.ndarray:
    return np.array(them, np.int32)


@each_case(
    ("survivors", "reason"),
    [
        ((1, 2, 3, 4, 4), "expected distinct"),
        ((1, 2, 3, 4, 6), "survivors: expected this client and clients that share its masks"),
        # The client itself among those that dropped out.
        ((2, 3, 4, 5), "survivors: expected this client and clients that share its masks"),
        ((1, 2, 3), "3 survivors are left, 4 are needed"),
    ],
)
def test_client_signs_only_possible_survivors(survivors: tuple[int, ...], reason: str) -> None:
    party, requests = before("consistency")
    told = lambda got: got.update(survivors=numbers(*survivors))  # noqa: E731

    assert reason in refusal(party, "site_1", changed(requests["site_1"], REQUESTS, told))
    # Nothing was signed, so the honest request is answered.
    assert party.reply("site_1", requests["site_1"]).kind == "consistency"


def test_client_without_masks_of_this_client_is_no_survivor() -> None:
    party, requests = before("consistency", leaves={"site_5": "shares"})
    told = lambda got: got.update(survivors=numbers(1, 2, 3, 5))  # noqa: E731

    reason = refusal(party, "site_1", changed(requests["site_1"], REQUESTS, told))

    assert "expected this client and clients that share its masks" in reason


def test_client_signs_one_set_of_survivors() -> None:
    party, requests = before("consistency")
    fewer = lambda got: got.update(survivors=numbers(1, 2, 3, 4))  # noqa: E731

    assert party.reply("site_1", requests["site_1"]).kind == "consistency"
    second = changed(requests["site_1"], REQUESTS, fewer)
    assert "request 'consistency' out of order" in refusal(party, "site_1", second)


@each_case(
    ("change", "reason"),
    [
        (lambda got: got["signers"].__setitem__(0, 6), "signers: expected clients that are in"),
        (lambda got: got["signers"].__setitem__(0, 2), "expected distinct"),
        (lambda got: got["signatures"].__iadd__(1), "client number 1 did not sign the same"),
        (
            lambda got: got.update(signatures=got["signatures"][::-1].copy()),
            "client number 1 did not sign the same survivors",
        ),
        (lambda got: got.update(signatures=got["signatures"][:4]), "signatures: expected 5, got 4"),
        (
            lambda got: got.update(signers=got["signers"][:3], signatures=got["signatures"][:3]),
            "3 clients signed the survivors, 4 are needed",
        ),
    ],
)
def test_client_unmasks_only_with_enough_signatures(
    change: Callable[[Arrays], None], reason: str
) -> None:
    party, requests = before("unmask")

    assert reason in refusal(party, "site_1", changed(requests["site_1"], REQUESTS, change))
    reply = party.reply("site_1", requests["site_1"])
    # One share of each client, once.
    assert len(decode_arrays(reply.body, REPLIES["unmask"])["shares"]) == 5
    assert "of another round" in refusal(party, "site_1", requests["site_1"])


def test_signatures_cover_the_keys_of_the_round() -> None:
    """A server may give a round the same tag, numbers and survivors as an earlier round."""
    keys = np.arange(5 * KEYS, dtype=np.uint8).reshape(5, KEYS)
    public = dict(enumerate(keys, 1))
    others = {**public, 3: keys[0]}
    numbers = dict(zip((1, 2, 3, 4, 6), keys, strict=True))

    statements = [
        survivors_statement(tag, known, survivors)
        for tag, known, survivors in (
            (bytes(16), public, [1, 2, 3, 4]),
            (bytes(16), others, [1, 2, 3, 4]),
            (bytes(16), numbers, [1, 2, 3, 4]),
            (bytes(16), public, [1, 2, 3, 5]),
            (bytes(15) + b"1", public, [1, 2, 3, 4]),
        )
    ]

    assert len(set(statements)) == 5
    assert survivors_statement(bytes(16), public, [4, 3, 2, 1]) == statements[0]


def test_replayed_round_is_refused() -> None:
    party, last_requests = before("unmask")
    old, replies = last_requests["site_1"], {(ask, c): m for ask, c, m in party.seen}
    requests = {m.kind: m for c, m in party.requests if c == "site_1"}
    party.run_round({"site_1": "unmask"})
    assert "of another round" in refusal(party, "site_1", old)
    assert "of another round" in refusal(party, "site_1", requests["train"])
    for ask in EXCHANGES[:3]:
        again = party.run_round(
            up=lambda c, m, ask=ask: replies[ask, c] if (c, m.kind) == ("site_2", ask) else m
        )
        assert "of another round" in again.dropouts["site_2"]
        assert np.array_equal(again.total, party.plain(["site_1", "site_3", "site_4", "site_5"]))


def test_second_vector_with_the_same_masks_is_refused() -> None:
    """The difference of two vectors would reveal the difference of the uploads."""
    party, _ = before("unmask")
    (request,) = [m for c, m in party.requests if (c, m.kind) == ("site_1", "train")]
    assert "request 'train' out of order" in refusal(party, "site_1", request)


@each_case(
    ("ask", "change", "reason"),
    [
        ("shares", lambda got: got["keys"][0].fill(0), "the public keys of this client are not"),
        ("shares", lambda got: got["keys"][1, :32].fill(0), "invalid public key"),
        (
            "shares",
            lambda got: got["keys"].__setitem__(1, got["keys"][2]),
            "duplicate public keys",
        ),
        (
            "shares",
            lambda got: got.update({n: got[n][:3] for n in ("numbers", "keys", "endorsements")}),
            "expected 4 to 7 (channel.secure_sum.threshold), got 3",
        ),
        ("shares", lambda got: got["numbers"].__setitem__(1, 1), "expected distinct"),
        ("shares", lambda got: got["numbers"].__setitem__(1, -1), "expected distinct"),
        ("train", lambda got: got["layout"].fill(0), "layout: differs"),
        (
            "train",
            lambda got: got["numbers"].__setitem__(0, 9),
            "expected exactly one from each other client",
        ),
        ("train", lambda got: got["head"].fill(-1), "unit of weights"),
        (
            "train",
            lambda got: got.update(numbers=got["numbers"][:2], sealed=got["sealed"][:2]),
            "3 clients are left",
        ),
    ],
)
def test_hostile_requests_are_refused(
    ask: str, change: Callable[[Arrays], None], reason: str
) -> None:
    party = Party(5)
    summed = party.run_round(down=replacing("site_1", ask, lambda m: changed(m, REQUESTS, change)))
    assert reason in summed.dropouts["site_1"]
    assert np.array_equal(summed.total, party.plain(["site_2", "site_3", "site_4", "site_5"]))


def test_twice_the_threshold_of_clients_is_refused() -> None:
    """Two halves of the holders could reconstruct both secrets of a client."""
    party = Party(4, threshold=2)

    with pytest.raises(RunFailedError, match=r"expected 2 to 3 \(channel.secure_sum.threshold\)"):
        party.run_round()


@each_case(
    ("ask", "change", "reason"),
    [
        (
            "shares",
            lambda got: got.update(numbers=got["numbers"][:2], sealed=got["sealed"][:2]),
            "receivers are not the other clients",
        ),
        ("shares", lambda got: got.update(sealed=got["sealed"][:2]), "shares: expected 4, got 2"),
        ("train", lambda got: got.update(vector=got["vector"][:-1]), "numbers, got"),
        ("keys", lambda got: got["keys"][:32].fill(0), "invalid public key"),
        ("keys", lambda got: got["keys"][32:].fill(0), "invalid public key"),
    ],
)
def test_hostile_replies_are_refused(
    ask: str, change: Callable[[Arrays], None], reason: str
) -> None:
    party = Party(5)
    summed = party.run_round(up=replacing("site_1", ask, lambda m: changed(m, REPLIES, change)))
    assert reason in summed.dropouts["site_1"]
    assert np.array_equal(summed.total, party.plain(["site_2", "site_3", "site_4", "site_5"]))


def test_wrong_shares_are_detected_and_replaced() -> None:
    party = Party(5)
    one, other = (
        replacing(
            client,
            "unmask",
            lambda m: changed(m, REPLIES, lambda got: got["shares"][:, 0].__iadd__(1)),
        )
        for client in ("site_2", "site_3")
    )

    # Seeds only; seeds and a masking key.
    for leaves in ({}, {"site_4": "train"}):
        if not leaves:
            summed = party.run_round(leaves, up=other)
            assert np.array_equal(summed.total, party.plain(summed.clients))
        with pytest.raises(
            RunFailedError,
            match=r"received . shares of the secret of site_1, but 4 valid shares are needed",
        ):
            party.run_round(leaves, up=lambda c, m: one(c, other(c, m)))


@pytest.mark.parametrize("messages", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_arbitrary_messages_cause_no_crash(messages: int) -> None:
    draw, party = random.Random(stream_key("fuzz")), Party(5)

    def garbled(message: Message) -> Message:
        body = bytearray(message.body)
        for _ in range(draw.choice((1, 3, 30))):
            body[draw.randrange(len(body))] = draw.randrange(256)
        cut = draw.choice((len(body), len(body), draw.randrange(len(body)), 0))
        return Message(
            draw.choice((message.kind, message.kind, *EXCHANGES, "refused", "")), bytes(body[:cut])
        )

    sums = 0
    for _ in range(messages):
        who, side, ask = (
            draw.choice(party.clients),
            draw.choice(("up", "down")),
            draw.choice(EXCHANGES),
        )
        change = lambda c, m: garbled(m) if c == who and m.kind == ask else m  # noqa: B023, E731
        try:
            sums += len(party.run_round(**{side: change}).clients) >= 4
        except RunFailedError as error:
            assert "secure aggregation stopped" in str(error) and "\n" not in str(error)
    assert sums > 0.6 * messages


# One hostile client of five
@each_case(
    ("forged", "reason"),
    [
        (b"\xff" * 64, "invalid public key"),
        (bytes(64), "invalid public key"),
        (b"\x09" + bytes(31) + b"\xff" * 32, "invalid public key"),
        ((2**255 - 19).to_bytes(32, "little") + b"\x09" + bytes(31), "invalid public key"),
        ((b"\x09" + bytes(31)) * 2, "duplicate public key"),
    ],
)
def test_unusable_public_key_drops_only_its_sender(forged: bytes, reason: str) -> None:
    party = Party(5)
    key = np.frombuffer(forged, np.uint8)
    forge = lambda got: got["keys"].__setitem__(slice(64), key)  # noqa: E731

    summed = party.run_round(up=replacing("site_3", "keys", lambda m: changed(m, REPLIES, forge)))

    assert summed.clients == ["site_1", "site_2", "site_4", "site_5"]
    assert summed.dropouts == {"site_3": reason}


def test_public_key_of_another_client_is_refused() -> None:
    party = Party(5)
    first: list[np.ndarray] = []

    def copy(client: str, message: Message) -> Message:
        if message.kind == "keys" and client == "site_1":
            first.append(decode_arrays(message.body, REPLIES["keys"])["keys"])
        if message.kind == "keys" and client == "site_3":
            other = np.roll(first[0][:64], 32)
            return changed(message, REPLIES, lambda got: got["keys"].__setitem__(slice(64), other))
        return message

    summed = party.run_round(up=copy)

    assert summed.dropouts == {"site_3": "duplicate public key"}


GARBAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda body: b"",
    "garbage": lambda body: random.Random(1).randbytes(len(body)),
    "truncated": lambda body: body[:-1],
    "flipped": lambda body: (
        body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
    ),
    "ff": lambda body: body[:-64] + b"\xff" * 64,
}


@each_case(("garbage", "ask"), itertools.product(GARBAGE, EXCHANGES))
def test_garbage_drops_or_names_its_sender(ask: str, garbage: str) -> None:
    party = Party(5)
    spoil = lambda message: Message(ask, GARBAGE[garbage](message.body))  # noqa: E731

    try:
        summed = party.run_round(up=replacing("site_3", ask, spoil))
    except RunFailedError as error:
        # Sealed shares are opened in the last exchange, when their sender cannot be dropped.
        assert ask == "shares" and "site_3" in str(error)
    else:
        assert {"site_1", "site_2", "site_4", "site_5"} <= set(summed.clients)
        assert set(summed.dropouts) <= {"site_3"}


def test_unreadable_sealed_shares_end_the_round() -> None:
    party = Party(5)
    unreadable = lambda m: changed(m, REPLIES, lambda got: got["sealed"].fill(7))  # noqa: E731

    with pytest.raises(RunFailedError, match="received 1 shares of the secret of site_2") as error:
        party.run_round(up=replacing("site_2", "shares", unreadable))
    assert "\n" not in str(error.value)


def test_shares_of_another_secret_are_refused() -> None:
    shares = crypto.split_secret(bytes(range(32)), 3, [1, 2, 3])
    assert crypto.combine_shares(dict(zip((1, 2, 3), shares, strict=True))) == bytes(range(32))
    assert crypto.combine_shares({1: b"\xff" * crypto.SHARE_LENGTH, 2: shares[1], 3: b""}) != bytes(
        range(32)
    )
