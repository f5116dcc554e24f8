"""The eight messages of the secure sum: tables of named arrays, encoded without pickle.

Clients stand in them by their number in the cohort (from 1 on), so that lengths follow from counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hetero_fl.communication.secure_aggregation import crypto
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.serialization import CodecError, decode, encode

FORM = "hetero_fl secure sum 1"
TAG = 16  # bytes that name a round's conversation: no message of another one passes for one of it
SEALED = crypto.NONCE + 2 * crypto.SHARE_LENGTH + crypto.MARK  # two shares, encrypted
Arrays = dict[str, np.ndarray]
Field = tuple[type[np.generic], tuple[int | None, ...]]  # None: of any length

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


def encode_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A message's bytes."""
    return encode({name: torch.from_numpy(array) for name, array in arrays.items()}, FORM)


def decode_arrays(data: bytes, fields: Mapping[str, Field]) -> Arrays:
    """A message that somebody sent. Raises PayloadError for anything but these fields of these types and shapes."""
    try:
        tree = decode(data, FORM)
    except CodecError as error:
        raise PayloadError(str(error)) from None
    if not isinstance(tree, dict) or set(tree) != set(fields):
        raise PayloadError(f"holds something else than {', '.join(fields)}")
    made: Arrays = {}
    for name, (dtype, shape) in fields.items():
        array = tree[name].numpy() if isinstance(tree[name], torch.Tensor) else None
        fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
        if (
            array is None
            or not fits
            or any(w not in (None, s) for s, w in zip(array.shape, shape, strict=True))
        ):
            raise PayloadError(f"{name} has another type or shape than agreed")
        made[name] = array
    return made


def client_numbers(array: np.ndarray) -> list[int]:
    """Clients' numbers. Raises PayloadError for one that is there twice or none."""
    numbers = array.tolist()
    if len(set(numbers)) < len(numbers) or min(numbers, default=1) < 1:
        raise PayloadError("numbers of clients that are not distinct numbers from 1 on")
    return numbers


def stack_byte_strings(*strings: bytes) -> np.ndarray:
    """Byte strings of equal length as rows, uint8 `[n, length]`."""
    return np.frombuffer(bytearray(b"".join(strings)), np.uint8).reshape(len(strings), -1)


def byte_string_to_row(string: bytes) -> np.ndarray:
    """One byte string, uint8 `[length]`."""
    return np.frombuffer(bytearray(string), np.uint8)


def message_sizes(members: int, numbers: int, broadcast: int) -> dict[str, tuple[int, int]]:
    """Bytes down to a client and up from it by request, in a round that nobody leaves: with so many members of its
    neighbourhood, itself among them, numbers in the vector, and bytes of the broadcast."""
    free = {"vector": numbers, "broadcast": broadcast, "dropped": 0}

    def size(ask: str, fields: Mapping[str, Field]) -> int:
        peers = (
            members if ask == "unmask" or (ask == "shares" and "keys" in fields) else members - 1
        )
        shapes = {
            n: [free.get(n, peers) if d is None else d for d in shape]
            for n, (_, shape) in fields.items()
        }
        return len(
            encode_arrays({n: np.zeros(shapes[n], dtype) for n, (dtype, _) in fields.items()})
        )

    return {ask: (size(ask, fields), size(ask, REPLIES[ask])) for ask, fields in REQUESTS.items()}
