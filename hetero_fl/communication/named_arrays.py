"""Named arrays as the body of a message, encoded without pickle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.serialization import CodecError, decode, encode

FORM = "hetero_fl arrays 1"
Arrays = dict[str, np.ndarray]
# Data type and shape of an array, in which None matches any size.
Field = tuple[type[np.generic], tuple[int | None, ...]]


def encode_arrays(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode named arrays as the body of a message."""
    return encode({name: torch.from_numpy(array) for name, array in arrays.items()}, FORM)


def decode_arrays(data: bytes, fields: Mapping[str, Field]) -> Arrays:
    """Decode the arrays of a message, and check the names, data types and shapes of the arrays.

    Args:
        data: The encoded message.
        fields: Expected data types and shapes of the arrays, keyed by name.

    Raises:
        PayloadError: If the message is malformed, or the names, data types or shapes differ from
            `fields`.
    """
    try:
        tree = decode(data, FORM)
    except CodecError as error:
        raise PayloadError(str(error)) from None
    if not isinstance(tree, dict) or set(tree) != set(fields):
        raise PayloadError(f"expected the fields {', '.join(fields)}")
    arrays: Arrays = {}
    for name, (dtype, shape) in fields.items():
        array = tree[name].numpy() if isinstance(tree[name], torch.Tensor) else None
        fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
        if (
            array is None
            or not fits
            or any(w not in (None, s) for s, w in zip(array.shape, shape, strict=True))
        ):
            raise PayloadError(f"{name}: unexpected type or shape")
        arrays[name] = array
    return arrays


def zero_arrays(
    fields: Mapping[str, Field], lengths: Mapping[str, int] | None = None, length: int = 0
) -> Arrays:
    """Return arrays of zeros.

    Args:
        fields: Data types and shapes of the arrays, keyed by name.
        lengths: Sizes that replace None in a shape, keyed by the name of the array.
        length: Size that replaces None in the shapes of all other arrays.
    """
    arrays: Arrays = {}
    for name, (dtype, shape) in fields.items():
        replacement = (lengths or {}).get(name, length)
        arrays[name] = np.zeros([replacement if d is None else d for d in shape], dtype)
    return arrays


def stack_byte_strings(*strings: bytes) -> np.ndarray:
    """Return byte strings of equal length as the rows of an array, dtype uint8."""
    return np.frombuffer(bytearray(b"".join(strings)), np.uint8).reshape(len(strings), -1)


def byte_string_to_row(string: bytes) -> np.ndarray:
    """Return a byte string as a one-dimensional array, dtype uint8."""
    return np.frombuffer(bytearray(string), np.uint8)
