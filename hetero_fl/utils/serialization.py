"""Encode trees of tensors as bytes without pickle, and write files atomically."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from hetero_fl.utils.errors import one_line

# Trees of tensors and plain values as bytes, without pickle: a safetensors file whose metadata
# holds the tree.
#
# Used for what travels (payloads) and for what is kept (checkpoints, saved models). Decoding trusts
# nothing: sizes are checked against the bytes that are there before anything is allocated.

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
NAMES = {torch.from_numpy(np.empty(0, dtype)).dtype: name for name, dtype in DTYPES.items()}
DEEPEST = 12
# A header is parsed only within these bounds: a value takes up to a hundred bytes of memory, however few its text has.
MOST_HEADER_BYTES = 2**22  # 10,000 tensors with names of 100 characters take 3 MB
MOST_HEADER_VALUES = 2**18  # names and values, roughly; a tensor takes about thirteen
MOST_REASON = 240  # characters of a CodecError
Tree = Any  # dict[str, Tree] | list[Tree] | Tensor | str | int | float | bool | None


class CodecError(ValueError):
    """Bytes that are not a tree of this format, in one short printable line."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message, MOST_REASON))


def as_tensor(data: bytes) -> Tensor:
    """Bytes as a leaf of a tree: uint8 `[N]`."""
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )


def as_bytes(data: Tensor) -> bytes:
    """The reverse of `as_tensor`."""
    return data.numpy().tobytes()


def encode(tree: Tree, form: str) -> bytes:
    """The tree as bytes. `form` names what it is ("payload 1"); `decode` asks for the same.

    Raises TypeError for values that have no plain form.
    """
    header, tensors = _layout(tree, form)
    arrays = [tensor.cpu().contiguous().numpy() for tensor in tensors]
    # The library's own writer fills fresh memory twice, which takes forty times as long.
    return b"".join([header, *(array.reshape(-1).data for array in arrays)])


def encoded_size(tree: Tree, form: str) -> int:
    """Return the length of `encode(tree, form)`, for which no tensor is read."""
    header, tensors = _layout(tree, form)
    return len(header) + sum(tensor.nbytes for tensor in tensors)


def _layout(tree: Tree, form: str) -> tuple[bytes, list[Tensor]]:
    """Return the header of a safetensors file, and the tensors that follow it."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, tensors)
    head = json.dumps({"form": form, "tree": plain}, allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"hetero_fl": head}}
    at = 0
    # so that all are aligned
    widest_first = sorted(tensors.items(), key=lambda entry: -entry[1].itemsize)
    for name, tensor in widest_first:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in widest_first]


def _flatten(tree: Tree, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach()
        if tree.dtype not in NAMES:
            raise TypeError(f"a tensor of {tree.dtype} has no plain form")
        return {"t": name}
    if isinstance(tree, dict):
        return {"d": {_string(k): _flatten(v, tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return [_flatten(v, tensors) for v in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"f": repr(tree)}
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(f"{type(tree).__name__} has no plain form")


def _string(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"keys are strings, not {type(key).__name__}")
    return key


def num_tensor_bytes(tree: Tree) -> int:
    """Bytes of a tree's tensors in memory."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict | list | tuple):
        return sum(map(num_tensor_bytes, tree.values() if isinstance(tree, dict) else tree))
    return 0


def decode(data: bytes, form: str, bounded: bool = True) -> Tree:
    """Read what `encode` wrote. Tensors own their memory.

    Args:
        data: The bytes; nothing of them is trusted.
        form: What the tree is, as it was given to `encode`.
        bounded: Whether headers over MOST_HEADER_BYTES or MOST_HEADER_VALUES are refused before they are parsed. Files that
            this process's own run directory holds may have longer ones.

    Raises:
        CodecError: The bytes are malformed or out of bounds.
    """
    with _refuse_malformed():
        head = _read_head(data, bounded)
        if head["form"] != form:
            raise CodecError(f"found {str(head['form'])[:40]!r} where '{form}' was expected")
        tensors = {n: _tensor(a) for n, a in deserialize(data)}
        return _unflatten(head["tree"], tensors, 0)


def copy_tree(tree: Tree) -> Tree:
    """Return the tree as `decode` returns it: contiguous tensors with memory of their own.

    They stay on their device.

    Raises:
        TypeError: If a value has no plain form.
        CodecError: If the tree is nested too deeply.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(_flatten(tree, tensors), allow_nan=False))
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return _unflatten(plain, copies, 0)


def read_json(text: str | bytes, bounded: bool = True) -> Any:
    """Parse untrusted JSON, within the bounds of a header.

    Raises:
        CodecError: The text is too long or has too many values.
        ValueError, RecursionError: It is not JSON or not UTF-8, is nested too deeply, or has a lone surrogate in a string.
    """
    if bounded and len(text) > MOST_HEADER_BYTES:
        raise CodecError(f"a header of {len(text):,} bytes; at most {MOST_HEADER_BYTES:,} are read")
    text = text if isinstance(text, str) else str(text, "utf-8")
    values = sum(text.count(mark) for mark in ",:[{")
    if bounded and values > MOST_HEADER_VALUES:
        raise CodecError(f"a header of {values:,} values; at most {MOST_HEADER_VALUES:,} are read")
    found = json.loads(text)
    # the only way in for a lone surrogate; a pair of them is one character
    if "\\ud" in text.lower():
        json.dumps(found, ensure_ascii=False).encode()
    return found


def check_header(data: bytes) -> None:
    """Raise CodecError for bytes that are no file of ours with a header within bounds."""
    with _refuse_malformed():
        _read_head(data, bounded=True)


@contextmanager
def _refuse_malformed() -> Iterator[None]:
    """Raise CodecError for whatever the parsing of malformed bytes raises."""
    try:
        yield
    except CodecError:
        raise
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        AttributeError,
    ) as error:
        raise CodecError(f"malformed: {type(error).__name__} {str(error)[:120]}") from None


def _read_head(data: bytes, bounded: bool) -> Any:
    """Return what `encode` wrote next to the tensors."""
    if len(data) < 8:
        raise CodecError(f"{len(data)} bytes are too few")
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise CodecError("the declared header is longer than the data")
    header = read_json(data[8 : 8 + size], bounded)
    return read_json(header["__metadata__"]["hetero_fl"], bounded)


def _tensor(entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise CodecError(f"dtype {entry['dtype']!r} does not travel")
    dtype = DTYPES[entry["dtype"]]
    raw = entry["data"]
    if entry["dtype"] == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise CodecError("a truth value that is neither 0 nor 1")
    array = np.frombuffer(bytearray(raw) if isinstance(raw, bytes) else raw, dtype).reshape(
        entry["shape"]
    )
    return torch.from_numpy(array)


def _unflatten(plain: Any, tensors: dict[str, Tensor], depth: int) -> Tree:
    if depth > DEEPEST:
        raise CodecError("nested too deeply")
    if isinstance(plain, list):
        return [_unflatten(v, tensors, depth + 1) for v in plain]
    if not isinstance(plain, dict):
        return plain
    match plain:
        case {"t": str(name), **rest} if not rest:
            # each once: two names for one memory would be two owners of it
            return tensors.pop(name)
        case {"d": dict(items), **rest} if not rest:
            return {k: _unflatten(v, tensors, depth + 1) for k, v in items.items()}
        case {"f": ("inf" | "-inf" | "nan") as number, **rest} if not rest:
            return float(number)
    raise CodecError("neither a value, a list, a tensor nor a dictionary")


# Files written in one step: after a crash at any moment they hold the old content or the new, never
# half of one.

CHUNK = 1 << 20  # bytes in memory while a file is hashed


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Replace a file: written beside it, flushed to disk, then renamed. Its folder is made if it is not there.

    `private`: readable by its owner alone, at every moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same temporary name: what a crash leaves behind is overwritten, not piled up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if private:
            temporary.unlink(missing_ok=True)  # one that a crash left may be readable by others
        with open(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666),
            "wb",
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content as hexadecimal digits. Raises OSError if it cannot be read."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return checksum.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder (Windows) do it by themselves."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
