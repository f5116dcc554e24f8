"""Requests and replies of the four exchanges of secure aggregation, as named arrays.

Messages are encoded without pickle. Clients are identified by their number in the cohort, starting
at 1, so that the length of a message does not depend on client ids.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hetero_fl.communication import authenticated_encryption
from hetero_fl.communication.named_arrays import Field, encode_arrays
from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.core.payload import PayloadError

# Number of random bytes that identify a round, so that messages of other rounds are refused.
TAG = 16
# Length in bytes of two encrypted shares, which are encrypted together.
SEALED = 2 * crypto.SHARE_LENGTH + authenticated_encryption.OVERHEAD

TAGGED: Field = (np.uint8, (TAG,))
NUMBERS: Field = (np.int32, (None,))
REQUESTS: dict[str, dict[str, Field]] = {
    "keys": {"tag": TAGGED},
    "shares": {
        "tag": TAGGED,
        "head": (np.int32, (2,)),
        "numbers": NUMBERS,
        "keys": (np.uint8, (None, 64)),
    },
    "train": {
        "tag": TAGGED,
        "head": (np.int32, (1,)),
        "layout": (np.uint8, (32,)),
        "numbers": NUMBERS,
        "sealed": (np.uint8, (None, SEALED)),
        "broadcast": (np.uint8, (None,)),
    },
    "unmask": {"tag": TAGGED, "survivors": NUMBERS, "dropped": NUMBERS},
}
REPLIES: dict[str, dict[str, Field]] = {
    "keys": {"tag": TAGGED, "keys": (np.uint8, (64,))},
    "shares": {
        "tag": TAGGED,
        "commitment": (np.uint8, (32,)),
        "numbers": NUMBERS,
        "sealed": (np.uint8, (None, SEALED)),
    },
    "train": {"tag": TAGGED, "vector": (np.int64, (None,))},
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


def message_sizes(members: int, numbers: int, broadcast: int) -> dict[str, tuple[int, int]]:
    """Return the message sizes of each exchange if no client drops out.

    Args:
        members: Number of clients in a client's neighborhood, including the client.
        numbers: Length of the vector.
        broadcast: Size of the encoded broadcast in bytes.

    Returns:
        Bytes sent to and by each client, as pairs (down, up), keyed by the kind of exchange.
    """
    known_lengths = {"vector": numbers, "broadcast": broadcast, "dropped": 0}

    def size(kind: str, fields: Mapping[str, Field]) -> int:
        includes_client = kind == "unmask" or (kind == "shares" and "keys" in fields)
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
