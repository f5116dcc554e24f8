"""Encode trees of tensors and plain values as bytes without pickle, and write files atomically.

A tree consists of nested dictionaries and lists. The encoding is a safetensors file whose metadata
contains the tree. Decoding accepts untrusted input: sizes are checked against the available bytes
before memory is allocated.

`check_entries`, `check_name` and `check_memory` check files and folders of strangers before they
are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from hetero_fl.utils.errors import UserError, one_line

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
# Maximum nesting depth of a tree.
DEEPEST = 12
# Limits of a header. A parsed value occupies up to a hundred bytes, even if its text is short.
# A header of 10,000 tensors with names of 100 characters has 3 MB, and about 13 values per tensor.
MAX_HEADER_BYTES = 2**22
MAX_HEADER_VALUES = 2**18
MAX_MESSAGE_CHARACTERS = 240
# Bytes that are read at once when a file is hashed.
CHUNK = 1 << 20
# Bytes that are written to check a folder.
PROBE = 1 << 16
# dict[str, Tree] | list[Tree] | Tensor | str | int | float | bool | None
Tree = Any


class CodecError(ValueError):
    """Raised when bytes are not a valid encoding of a tree.

    Args:
        message: The message, which is shortened to one printable line.
    """

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message, MAX_MESSAGE_CHARACTERS))


def as_tensor(data: bytes) -> Tensor:
    """Copy bytes to a tensor, uint8 `[N]`."""
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )


def as_bytes(data: Tensor) -> bytes:
    """Convert a tensor created by `as_tensor` to bytes."""
    return data.numpy().tobytes()


def encode(tree: Tree, form: str) -> bytes:
    """Encode a tree as bytes.

    Args:
        tree: The tree.
        form: Name and version of the format, such as `payload 1`, which `decode` checks.

    Raises:
        TypeError: If a value cannot be encoded.

    Example:
        >>> import torch
        >>> from hetero_fl.utils.serialization import decode, encode
        >>> data = encode({"weight": torch.ones(2), "round": 3}, "example 1")
        >>> decode(data, "example 1")
        {'weight': tensor([1., 1.]), 'round': 3}
    """
    header, tensors = _layout(tree, form)
    arrays = [tensor.cpu().contiguous().numpy() for tensor in tensors]
    # The writer of safetensors copies the data twice and takes forty times as long.
    return b"".join([header, *(array.reshape(-1).data for array in arrays)])


def encoded_size(tree: Tree, form: str) -> int:
    """Return the length of the encoded tree in bytes, without encoding the tensors.

    Args:
        tree: The tree.
        form: Name and version of the format.

    Raises:
        TypeError: If a value cannot be encoded.
    """
    header, tensors = _layout(tree, form)
    return len(header) + sum(tensor.nbytes for tensor in tensors)


def _layout(tree: Tree, form: str) -> tuple[bytes, list[Tensor]]:
    """Return the header of a safetensors file, and the tensors in the order of the file."""
    tensors: dict[str, Tensor] = {}
    plain = _flatten(tree, tensors)
    head = json.dumps({"form": form, "tree": plain}, allow_nan=False)
    header: dict[str, Any] = {"__metadata__": {"hetero_fl": head}}
    offset = 0
    # In descending order of the element size, all tensors are aligned.
    widest_first = sorted(tensors.items(), key=lambda entry: -entry[1].itemsize)
    for name, tensor in widest_first:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensor for _, tensor in widest_first]


def _flatten(tree: Tree, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach()
        if tree.dtype not in NAMES:
            raise TypeError(f"cannot encode a tensor of {tree.dtype}")
        return {"t": name}
    if isinstance(tree, dict):
        return {"d": {_check_key(k): _flatten(v, tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return [_flatten(v, tensors) for v in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"f": repr(tree)}
    if tree is None or isinstance(tree, str | int | float):
        return tree
    raise TypeError(f"cannot encode {type(tree).__name__}")


def _check_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"expected keys of type str, got {type(key).__name__}")
    return key


def num_tensor_bytes(tree: Tree) -> int:
    """Return the number of bytes that the tensors of a tree occupy in memory."""
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict | list | tuple):
        return sum(map(num_tensor_bytes, tree.values() if isinstance(tree, dict) else tree))
    return 0


def decode(data: bytes, form: str, bounded: bool = True) -> Tree:
    """Decode a tree whose tensors own their memory.

    Args:
        data: Untrusted bytes.
        form: Name of the format, as passed to `encode`.
        bounded: Whether headers that exceed the limits are rejected before they are parsed. Set to
            False for files in the run directory, whose headers may be longer.

    Raises:
        CodecError: If the bytes are malformed or exceed the limits.
    """
    with refuse_malformed():
        head = _read_head(data, bounded)
        if head["form"] != form:
            raise CodecError(f"expected '{form}', got {str(head['form'])[:40]!r}")
        tensors = {n: _tensor(a) for n, a in deserialize(data)}
        return _unflatten(head["tree"], tensors, 0)


def copy_tree(tree: Tree) -> Tree:
    """Copy a tree, with the same result as encoding and decoding, on the same devices.

    Raises:
        TypeError: If a value cannot be encoded.
        CodecError: If the tree is nested too deeply.
    """
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(_flatten(tree, tensors), allow_nan=False))
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return _unflatten(plain, copies, 0)


def read_json(text: str | bytes, bounded: bool = True) -> Any:
    """Parse untrusted JSON.

    Args:
        text: The text. Bytes are decoded as UTF-8.
        bounded: Whether texts that exceed the limits of a header are rejected.

    Raises:
        CodecError: If the text is too long or has too many values.
        ValueError: If the text is not valid JSON or UTF-8, or a string contains a lone surrogate.
        RecursionError: If the text is nested too deeply.
    """
    if bounded and len(text) > MAX_HEADER_BYTES:
        raise CodecError(f"header: expected at most {MAX_HEADER_BYTES:,} bytes, got {len(text):,}")
    text = text if isinstance(text, str) else str(text, "utf-8")
    values = sum(text.count(mark) for mark in ",:[{")
    if bounded and values > MAX_HEADER_VALUES:
        raise CodecError(f"header: expected at most {MAX_HEADER_VALUES:,} values, got {values:,}")
    parsed = json.loads(text)
    # Only an escape can result in a lone surrogate, which cannot be encoded.
    if "\\ud" in text.lower():
        json.dumps(parsed, ensure_ascii=False).encode()
    return parsed


def check_header(data: bytes) -> None:
    """Check the header of an encoded tree.

    Raises:
        CodecError: If the header is malformed or exceeds the limits.
    """
    with refuse_malformed():
        _read_head(data, bounded=True)


@contextmanager
def refuse_malformed() -> Iterator[None]:
    """Convert all errors that malformed bytes cause inside the `with` block to CodecError."""
    try:
        yield
    except (CodecError, UserError):
        raise
    except (
        SafetensorError,
        LookupError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
        AttributeError,
    ) as error:
        raise CodecError(f"malformed: {type(error).__name__} {str(error)[:120]}") from error


def _read_head(data: bytes, bounded: bool) -> Any:
    if len(data) < 8:
        raise CodecError(f"expected at least 8 bytes, got {len(data)}")
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise CodecError("the declared header is longer than the data")
    header = read_json(data[8 : 8 + size], bounded)
    return read_json(header["__metadata__"]["hetero_fl"], bounded)


def _tensor(entry: dict[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise CodecError(f"dtype {entry['dtype']!r} is not supported")
    dtype = DTYPES[entry["dtype"]]
    raw = entry["data"]
    if entry["dtype"] == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise CodecError("expected booleans as bytes 0 and 1")
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
            # Each tensor may occur once: two names must not share memory.
            return tensors.pop(name)
        case {"d": dict(items), **rest} if not rest:
            return {k: _unflatten(v, tensors, depth + 1) for k, v in items.items()}
        case {"f": ("inf" | "-inf" | "nan") as number, **rest} if not rest:
            return float(number)
    raise CodecError("expected a value, a list, a tensor or a dictionary")


def make_folder(folder: Path) -> None:
    """Create a folder if necessary, and check that a file can be written to it.

    Commands call this function before they work, so that they do not lose their results.

    Raises:
        UserError: If the folder cannot be created, is not writable, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE))
    except OSError as error:
        raise UserError(
            f"{folder}: not writable ({error.strerror}); choose another folder"
        ) from None


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Replace the content of a file in one step.

    The data is written to a temporary file, flushed to disk and renamed, so that the file has
    either the old or the new content after a crash. Missing folders are created.

    Args:
        path: The file.
        data: The new content.
        private: Whether only the owner may read the file, even during writing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is always the same, so that files left by crashes do not accumulate.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # A file left by a crash may be readable by others.
        if private:
            temporary.unlink(missing_ok=True)
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


def check_private(path: Path, content: str = "key") -> None:
    """Check that other users of this machine cannot read a file.

    On systems without POSIX permissions, nothing is checked.

    Args:
        path: The file.
        content: Noun for the content of the file in the error message.

    Raises:
        UserError: If other users can read the file.
    """
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise UserError(f"{path}: other users can read this {content}; run chmod 600 {path}")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file as hexadecimal digits."""
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    return checksum.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a renamed file survives a crash.

    This function has no effect on Windows, where flushing folders is not necessary.
    """
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_entries(folder: Path, where: str = "", advice: str = "") -> None:
    """Check that a folder contains only regular files and folders, and links to places within it.

    Links of a snapshot in a hub cache may lead to all places within the folder of its repository.

    Args:
        folder: Folder to check, with its subfolders.
        where: Beginning of error messages.
        advice: End of the error message on a link that leaves the folder.

    Raises:
        UserError: If a link leaves the folder, or an entry is a pipe, a socket or a device.
    """
    home = allowed_root(folder)
    pending = [str(folder)]
    while pending:
        # Readers report the folders that they cannot open.
        with suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                # Unlike `Path.resolve`, this accepts links to themselves.
                target = os.path.realpath(entry.path) if entry.is_symlink() else ""
                if target and not Path(target).is_relative_to(home):
                    raise UserError(f"{where}{entry.path}: leads out to {target}{advice}")
                if target and Path(entry.path).parent.resolve().is_relative_to(target):
                    raise UserError(f"{where}{entry.path}: leads to a folder that contains it")
                if not target and entry.is_dir():
                    pending.append(entry.path)
                elif not target and not entry.is_file():
                    raise UserError(f"{where}{entry.path}: expected a file or a folder")


def allowed_root(folder: Path) -> Path:
    """Return the folder to whose files links in a folder may lead.

    This is the folder, or that of its repository if it is a snapshot in a hub cache.
    """
    root = folder.resolve()
    is_repository = re.compile(r"(datasets|models|spaces)--.+").fullmatch
    return next((place for place in root.parents if is_repository(place.name)), root)


def check_name(name: str, where: str) -> None:
    """Check that the name of a file, which is relative to a folder, does not leave the folder.

    Args:
        name: The name, with slashes.
        where: Place of the name, for the error message.

    Raises:
        UserError: If the name is empty or absolute, or contains `..`.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{where}: expected a file in the folder, got '{one_line(name, 80)}'")


def check_memory(size: int, where: str) -> None:
    """Check that values of an announced size fit into the free memory, where this is known.

    Args:
        size: Number of bytes.
        where: Place of the values, for the error message.

    Raises:
        UserError: If there is not enough memory.
    """
    with suppress(OSError):
        free = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        if free is not None and size > 1024 * int(free[1]):
            raise UserError(
                f"{where}: needs {size / 2**30:,.1f} GiB of memory, of which "
                f"{int(free[1]) / 2**20:,.1f} GiB are free"
            )
