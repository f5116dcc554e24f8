"""Sites sign the keys of a round, so that the server cannot replace them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)

from hetero_fl.communication.named_arrays import decode_arrays, encode_arrays
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.messages import REQUESTS
from hetero_fl.communication.secure_aggregation.site_keys import ENDORSEMENT, SiteKeys
from tests.helpers.secure_aggregation import Party

Arrays = dict[str, np.ndarray]
NOT_SIGNED = "the keys of client number 2 are not signed by a site of allows.keys"


def signing_party(count: int = 4) -> Party:
    """Return clients of which the first knows the keys of all others."""
    party = Party(count, threshold=3)
    keys = {client: generate_private_key(SECP384R1()) for client in party.clients}
    party.site_keys = {client: SiteKeys(key) for client, key in keys.items()}
    others = tuple(key.public_key() for client, key in keys.items() if client != "site_1")
    party.site_keys["site_1"] = SiteKeys(keys["site_1"], others)
    return party


@pytest.mark.parametrize("curve", [SECP256R1, SECP384R1, SECP521R1])
def test_endorsements_have_a_fixed_length(curve: type) -> None:
    keys = SiteKeys(generate_private_key(curve()))

    assert {len(keys.endorse(bytes(16), bytes(96))) for _ in range(20)} == {ENDORSEMENT}
    assert len(SiteKeys().endorse(bytes(16), bytes(96))) == ENDORSEMENT


def test_signed_round_keys_are_accepted() -> None:
    party = signing_party()

    summed = party.run_round()

    assert summed.clients == party.clients
    assert np.array_equal(summed.total, party.plain(party.clients))


def swap(name: str) -> Callable[[Arrays], None]:
    return lambda got: got[name].__setitem__(1, got[name][2])


def flip(name: str) -> Callable[[Arrays], None]:
    return lambda got: got[name][1, -1:].__ixor__(1)


@pytest.mark.parametrize(
    "change",
    [
        # The server's own signature key, and a signature that was changed or is missing.
        flip("keys"),
        flip("endorsements"),
        lambda got: got["endorsements"][1].fill(0),
        # The signature of another site, for other keys.
        swap("endorsements"),
    ],
)
def test_replaced_round_keys_are_refused(change: Callable[[Arrays], None]) -> None:
    party = signing_party()

    def replace(client: str, message: Message) -> Message:
        if (client, message.kind) != ("site_1", "shares"):
            return message
        arrays = decode_arrays(message.body, REQUESTS["shares"])
        change(arrays)
        return Message("shares", encode_arrays(arrays))

    summed = party.run_round(down=replace)

    assert NOT_SIGNED in summed.dropouts["site_1"]


@pytest.mark.parametrize("key", [None, generate_private_key(SECP384R1())])
def test_keys_of_an_unknown_site_are_refused(key: EllipticCurvePrivateKey | None) -> None:
    party = signing_party()
    party.site_keys["site_2"] = SiteKeys(key)

    assert NOT_SIGNED in party.run_round().dropouts["site_1"]


def test_site_that_takes_part_twice_is_refused() -> None:
    party = signing_party()
    party.site_keys["site_3"] = party.site_keys["site_2"]

    refused = party.run_round().dropouts["site_1"]

    assert "the keys of client number 3 are not signed" in refused


def test_keys_of_another_round_are_refused() -> None:
    """The server may know secrets of the clients that dropped out of an earlier round."""
    party = signing_party()
    party.run_round()
    (old,) = [m for client, m in party.requests if (client, m.kind) == ("site_1", "shares")]
    known = decode_arrays(old.body, REQUESTS["shares"])

    def replay(client: str, message: Message) -> Message:
        if (client, message.kind) != ("site_1", "shares"):
            return message
        arrays = decode_arrays(message.body, REQUESTS["shares"])
        for name in ("keys", "endorsements"):
            arrays[name][1] = known[name][1]
        return Message("shares", encode_arrays(arrays))

    summed = party.run_round(down=replay)

    assert NOT_SIGNED in summed.dropouts["site_1"]
