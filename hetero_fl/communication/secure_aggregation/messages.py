"""Requests and replies of the five exchanges of secure aggregation, as named arrays.

Messages are encoded without pickle. Clients are identified by their position among all clients of
the federation, starting at 1, so that the length of a message does not depend on client ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from hetero_fl.communication import authenticated_encryption
from hetero_fl.communication.named_arrays import Field, encode_arrays
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.communication.secure_aggregation.site_keys import ENDORSEMENT
from hetero_fl.core.payload import PayloadError

# Number of random bytes that identify a round, so that messages of other rounds are refused.
TAG = 16
# Length in bytes of two encrypted shares, which are encrypted together.
SEALED = 2 * crypto.SHARE_LENGTH + authenticated_encryption.OVERHEAD
# Length in bytes of the public keys of a client: for shares, for masks and for signatures.
KEYS = 3 * crypto.KEY_LENGTH

TAGGED: Field = (np.uint8, (TAG,))
NUMBERS: Field = (np.int32, (None,))
SIGNATURES: Field = (np.uint8, (None, crypto.SIGNATURE))
SIGNED: Field = (np.uint8, (crypto.SIGNATURE,))
ENDORSED: Field = (np.uint8, (ENDORSEMENT,))
REQUESTS: dict[str, dict[str, Field]] = {
    "keys": {"tag": TAGGED},
    "shares": {
        "tag": TAGGED,
        "head": (np.int32, (1,)),
        "numbers": NUMBERS,
        "keys": (np.uint8, (None, KEYS)),
        "endorsements": (np.uint8, (None, ENDORSEMENT)),
    },
    "train": {
        "tag": TAGGED,
        "head": (np.int32, (1,)),
        "layout": (np.uint8, (32,)),
        "numbers": NUMBERS,
        "sealed": (np.uint8, (None, SEALED)),
        "broadcast": (np.uint8, (None,)),
    },
    "consistency": {"tag": TAGGED, "survivors": NUMBERS},
    "unmask": {"tag": TAGGED, "signers": NUMBERS, "signatures": SIGNATURES},
}
REPLIES: dict[str, dict[str, Field]] = {
    "keys": {"tag": TAGGED, "keys": (np.uint8, (KEYS,)), "endorsement": ENDORSED},
    "shares": {
        "tag": TAGGED,
        "commitment": (np.uint8, (32,)),
        "numbers": NUMBERS,
        "sealed": (np.uint8, (None, SEALED)),
    },
    "train": {"tag": TAGGED, "vector": (np.int64, (None,))},
    "consistency": {"tag": TAGGED, "signature": SIGNED},
    "unmask": {
        "tag": TAGGED,
        "numbers": NUMBERS,
        "shares": (np.uint8, (None, crypto.SHARE_LENGTH)),
    },
}


def client_numbers(array: np.ndarray) -> list[int]:
    """Convert an array of client numbers to a list, and check the numbers.

    Raises:
        PayloadError: If the numbers are not distinct and positive.
    """
    numbers = array.tolist()
    if len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise PayloadError("client numbers: expected distinct positive integers")
    return numbers


def survivors_statement(
    tag: bytes, public: Mapping[int, np.ndarray], survivors: Iterable[int]
) -> bytes:
    """Return what a client signs before it reveals shares: whose vectors are in the sum.

    The statement covers the keys of all clients, which are new in each round, so that no signature
    of another round is valid.

    Args:
        tag: Bytes that identify the round.
        public: Public keys of the clients that hold shares, keyed by number.
        survivors: Numbers of the clients whose vectors are in the sum.
    """
    keys = b"".join(keys.tobytes() for keys in public.values())
    numbers = [np.array(group, np.int32).tobytes() for group in (list(public), sorted(survivors))]
    content = b"".join([tag, len(public).to_bytes(4, "little"), *numbers, keys])
    return b"hetero_fl secure sum: survivors" + hashlib.sha256(content).digest()


def check_signatures(
    statement: bytes, numbers: list[int], signatures: np.ndarray, public: Mapping[int, np.ndarray]
) -> None:
    """Check that clients signed a statement.

    Args:
        statement: The statement.
        numbers: Numbers of the clients.
        signatures: Their signatures, shape `[len(numbers), 64]`.
        public: Public keys of the clients, keyed by number.

    Raises:
        PayloadError: If a signature is missing or invalid.
    """
    if len(numbers) != len(signatures):
        raise PayloadError(f"signatures: expected {len(numbers)}, got {len(signatures)}")
    for number, signature in zip(numbers, signatures, strict=True):
        key = public[number][2 * crypto.KEY_LENGTH :].tobytes()
        if not crypto.is_signed(key, signature.tobytes(), statement):
            raise PayloadError(f"client number {number} did not sign the same survivors")


def message_sizes(members: int, numbers: int, broadcast: int) -> dict[str, tuple[int, int]]:
    """Return the message sizes of each exchange if no client drops out.

    Args:
        members: Number of clients in the cohort.
        numbers: Length of the vector.
        broadcast: Size of the encoded broadcast in bytes.

    Returns:
        Bytes sent to and by each client, as pairs (down, up), keyed by the kind of exchange.
    """
    known_lengths = {"vector": numbers, "broadcast": broadcast}

    def size(kind: str, fields: Mapping[str, Field]) -> int:
        includes_client = kind in ("consistency", "unmask") or "endorsements" in fields
        peers = members if includes_client else members - 1
        shapes = {
            n: [known_lengths.get(n, peers) if d is None else d for d in shape]
            for n, (_, shape) in fields.items()
        }
        return len(
            encode_arrays({n: np.zeros(shapes[n], dtype) for n, (dtype, _) in fields.items()})
        )

    return {
        kind: (size(kind, fields), size(kind, REPLIES[kind])) for kind, fields in REQUESTS.items()
    }
