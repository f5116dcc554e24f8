"""Sites sign the keys of a round, so that the server cannot replace them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    SECP521R1,
    generate_private_key,
)

from hetero_fl.communication.named_arrays import decode_arrays, encode_arrays
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.client import REQUESTS
from hetero_fl.communication.secure_aggregation.crypto import ENDORSEMENT, SiteKeys
from tests.support.cases import each_case
from tests.support.secure_aggregation import Party, replacing

Arrays = dict[str, np.ndarray]
NOT_SIGNED = "the keys of 'site_2' are not signed with its key in allows.keys"


def signing_party(count: int = 4) -> Party:
    """Return clients of which the first knows the keys of all others."""
    party = Party(count, threshold=3)
    keys = {client: generate_private_key(SECP384R1()) for client in party.clients}
    party.site_keys = {client: SiteKeys(key) for client, key in keys.items()}
    others = {client: key.public_key() for client, key in keys.items() if client != "site_1"}
    party.site_keys["site_1"] = SiteKeys(keys["site_1"], others)
    return party


@each_case("curve", [SECP256R1, SECP384R1, SECP521R1])
def test_endorsements_have_a_fixed_length(curve: type) -> None:
    keys = SiteKeys(generate_private_key(curve()))

    assert {len(keys.endorse(bytes(16), bytes(96))) for _ in range(20)} == {ENDORSEMENT}
    assert len(SiteKeys().endorse(bytes(16), bytes(96))) == ENDORSEMENT


def swap(name: str) -> Callable[[Arrays, Arrays], None]:
    return lambda got, _: got[name].__setitem__(1, got[name][2])


def flip(name: str) -> Callable[[Arrays, Arrays], None]:
    return lambda got, _: got[name][1, -1:].__ixor__(1)


def replay(got: Arrays, known: Arrays) -> None:
    """Send the keys of an earlier round, of which the server may know secrets."""
    for name in ("keys", "endorsements"):
        got[name][1] = known[name][1]


@each_case(
    "change",
    [
        # The server's own signature key, and a signature that was changed or is missing.
        flip("keys"),
        flip("endorsements"),
        lambda got, _: got["endorsements"][1].fill(0),
        # The signature of another site, for other keys.
        swap("endorsements"),
        replay,
    ],
)
def test_replaced_round_keys_are_refused(change: Callable[[Arrays, Arrays], None]) -> None:
    party = signing_party()
    assert party.run_round().clients == party.clients
    (old,) = [m for client, m in party.requests if (client, m.kind) == ("site_1", "shares")]

    def replace(message: Message) -> Message:
        arrays = decode_arrays(message.body, REQUESTS["shares"])
        change(arrays, decode_arrays(old.body, REQUESTS["shares"]))
        return Message("shares", encode_arrays(arrays))

    summed = party.run_round(down=replacing("site_1", "shares", replace))

    assert NOT_SIGNED in summed.dropouts["site_1"]


@each_case("key", ["none", "unknown", "site_3"])
def test_keys_that_another_site_signed_are_refused(key: str) -> None:
    party = signing_party()
    unknown = {"none": SiteKeys(), "unknown": SiteKeys(generate_private_key(SECP384R1()))}
    party.site_keys["site_2"] = (unknown | party.site_keys)[key]

    assert NOT_SIGNED in party.run_round().dropouts["site_1"]
