"""Requests and replies of a round with homomorphic encryption, as named arrays.

The server's state is sent as a message of its own: encoded at the start of a run, and sealed with
the shared key after the first aggregation.
"""

from __future__ import annotations

import numpy as np

from hetero_fl.communication.homomorphic.ckks import ciphertext_length, num_ciphertexts
from hetero_fl.communication.homomorphic.key import NAME, SEAL_BYTES, SharedKey
from hetero_fl.communication.named_arrays import Arrays, Field, encode_arrays
from hetero_fl.core.payload import PayloadError

BYTES: Field = (np.uint8, (None,))
ROWS: Field = (np.uint8, (None, None))
LAYOUT: Field = (np.uint8, (32,))
# Exponent of the power of two by which clients divide values and weights.
UNIT: Field = (np.int32, (1,))
REQUESTS: dict[str, dict[str, Field]] = {
    "train": {"unit": UNIT, "layout": LAYOUT, "state": BYTES},
    # `clients` are the positions in the federation of the clients in the sum.
    "aggregate": {
        "unit": UNIT,
        "layout": LAYOUT,
        "clients": (np.int32, (None,)),
        "sum": ROWS,
        "state": BYTES,
    },
}
REPLIES: dict[str, dict[str, Field]] = {
    "train": {"key": (np.uint8, (NAME,)), "ciphertexts": ROWS},
    "aggregate": {"state": BYTES},
}
# First byte of a message with the server's state.
PLAIN = b"\0"
SEALED = b"\1"
# Data that is authenticated with a sealed state.
ASSOCIATED_DATA = b"hetero_fl state of the server"


def seal_state(state: bytes, key: SharedKey) -> bytes:
    """Return a message with the server's encoded state that only clients can read."""
    return SEALED + key.encrypt(state, ASSOCIATED_DATA)


def unseal_state(message: bytes, key: SharedKey) -> bytes:
    """Return the server's encoded state in a message.

    Raises:
        PayloadError: If the message is malformed or was sealed with another key.
    """
    if message[:1] == PLAIN:
        return message[1:]
    if message[:1] != SEALED:
        raise PayloadError("state of the server: malformed")
    return key.decrypt(message[1:], ASSOCIATED_DATA)


def train_sizes(length: int, state: int) -> tuple[int, int]:
    """Return the sizes of the request to train and of the reply in bytes.

    Args:
        length: Length of the vector that clients send.
        state: Size of the message with the server's state in bytes.
    """
    shape = num_ciphertexts(length), ciphertext_length()
    request: Arrays = {"unit": _zeros(UNIT), "layout": _zeros(LAYOUT)}
    request["state"] = np.zeros(state, np.uint8)
    reply: Arrays = {"key": np.zeros(NAME, np.uint8), "ciphertexts": np.zeros(shape, np.uint8)}
    return len(encode_arrays(request)), len(encode_arrays(reply))


def aggregate_sizes(length: int, clients: int, before: int, after: int) -> tuple[int, int]:
    """Return the sizes of the request to aggregate and of the reply in bytes.

    Args:
        length: Length of the vector that clients send.
        clients: Number of clients in the sum.
        before: Size of the message with the server's state before the aggregation, in bytes.
        after: Size of the encoded state after the aggregation, in bytes.
    """
    request: Arrays = {
        "unit": _zeros(UNIT),
        "layout": _zeros(LAYOUT),
        "clients": np.zeros(clients, np.int32),
        "sum": np.zeros((num_ciphertexts(length), ciphertext_length()), np.uint8),
        "state": np.zeros(before, np.uint8),
    }
    reply: Arrays = {"state": np.zeros(len(SEALED) + SEAL_BYTES + after, np.uint8)}
    return len(encode_arrays(request)), len(encode_arrays(reply))


def _zeros(field: Field) -> np.ndarray:
    dtype, shape = field
    return np.zeros([size or 0 for size in shape], dtype)
