"""Checkpoints of a run.

A checkpoint is a small file with the name of a blob, the head, which names all other blobs of the
checkpoint: the private states of clients, and the rest of the run's state. Blobs of unchanged
states belong to several checkpoints. The two newest checkpoints are kept. Blobs are deleted when no
kept checkpoint names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hetero_fl.federation.blob_store import BlobStore
from hetero_fl.federation.state_store import BLOBS, StateStore
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import (
    CodecError,
    as_bytes,
    as_tensor,
    decode,
    encode,
    num_tensor_bytes,
    refuse_malformed,
    write_atomically,
)

FORM = "hetero_fl checkpoint 4"
# First bytes of the checkpoints of earlier versions.
EARLIER = b"HFLCKPT"
# Maximum size in bytes of nested dictionaries that are written and read as a whole. Larger
# dictionaries are split, so that a second copy of the whole state is never in memory.
PIECE = 16 << 20
KEPT_CHECKPOINTS = 2
_NAME = re.compile(r"round-(\d{6,})\.ckpt")


class EarlierVersionError(UserError):
    """Raised when a checkpoint was written by an earlier version of hetero_fl."""


class Checkpoints:
    """Checkpoints of a run, in the folder of the state store.

    Args:
        store: Store of the clients' private states.
        log: Function that is called with a message for each damaged checkpoint.

    Raises:
        ValueError: If the store has no folder, so that private states are only in memory.
    """

    def __init__(self, store: StateStore, log: Callable[[str], None]) -> None:
        if store.folder is None or store.blobs is None:
            raise ValueError("store: must have a folder for checkpoints, got a store in memory")
        self.store = store
        self.folder = store.folder
        self.blobs = store.blobs
        self.log = log
        # Names of the blobs of each kept checkpoint.
        self._names: dict[Path, set[str]] = {}

    def save(
        self, completed: int, state: Mapping[str, Any], kept_rounds: Collection[int] = ()
    ) -> Path:
        """Write a checkpoint, including the committed and staged private states.

        Args:
            completed: Number of completed rounds.
            state: The rest of the run's state, as nested dictionaries.
            kept_rounds: Rounds whose checkpoints are kept, in addition to the two newest.

        Returns:
            Path of the checkpoint.
        """
        path = self.folder / checkpoint_name(completed)
        tree = self._put_tree(dict(state))
        head = Head(tree, self.store.committed, self.store.staged)
        name = self.blobs.put(head.encode())
        self.blobs.sync()
        write_atomically(path, name.encode())
        self._names[path] = {name, *head.names()}
        # Later files are damaged checkpoints, which `load_newest` has skipped.
        self._remove_files_after(completed)
        self._remove_unused_files(kept_rounds)
        return path

    def _put_tree(self, tree: Any) -> Any:
        """Write nested dictionaries, and return the name of the blob.

        If the dictionary is larger than `PIECE`, each value is written separately, and a dictionary
        of names is returned.
        """
        if isinstance(tree, dict) and num_tensor_bytes(tree) > PIECE:
            return {key: self._put_tree(value) for key, value in tree.items()}
        return self.blobs.put(encode(tree, FORM))

    def load(self, completed: int) -> dict[str, Any] | None:
        """Load the checkpoint of a round, including the private states.

        All private states in the store are replaced by the private states in the checkpoint.

        Args:
            completed: Number of completed rounds.

        Returns:
            The rest of the run's state, or None if the checkpoint is missing or damaged. The store
            is then empty.
        """
        files = checkpoint_files(self.folder)
        return self._load_first_undamaged([p for p in files if checkpoint_round(p) == completed])

    def load_newest(self) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint, including the private states.

        All private states in the store are replaced by the private states in the checkpoint.

        Returns:
            The rest of the run's state, or None if there is no checkpoint.

        Raises:
            RunFailedError: If all checkpoints are damaged.
            EarlierVersionError: If the checkpoints were written by an earlier version.
        """
        files = checkpoint_files(self.folder)
        tree = self._load_first_undamaged(files)
        if tree is None and files:
            raise RunFailedError(
                f"{self.folder}: all checkpoints are damaged; start a new run in another folder"
            )
        return tree

    def load_before(self, completed: int) -> dict[str, Any] | None:
        """Load the newest undamaged checkpoint before a round, and remove later checkpoints.

        All private states in the store are replaced by the private states in the checkpoint.

        Args:
            completed: Number of completed rounds. Only checkpoints with fewer completed rounds are
                considered.

        Returns:
            The rest of the run's state, or None if there is no such checkpoint. The store is then
            empty, and no checkpoint is removed.
        """
        files = checkpoint_files(self.folder)
        tree = self._load_first_undamaged([p for p in files if checkpoint_round(p) < completed])
        if tree is not None:
            self._remove_files_after(completed - 1)
        return tree

    def _load_first_undamaged(self, files: list[Path]) -> dict[str, Any] | None:
        self.store.load({}, {})
        for path in reversed(files):
            try:
                saved = read_checkpoint(path)
            except (CodecError, OSError) as error:
                fallback = "" if path == files[0] else "; using the previous checkpoint"
                self.log(f"{path.name}: damaged ({error}){fallback}")
                continue
            self.store.load(saved.head.committed, saved.head.staged)
            return saved.tree
        return None

    def _remove_files_after(self, completed: int) -> None:
        for path in checkpoint_files(self.folder):
            if checkpoint_round(path) > completed:
                path.unlink()

    def _remove_unused_files(self, kept_rounds: Collection[int]) -> None:
        """Remove checkpoints that are not kept, and the blobs that no kept checkpoint names."""
        files = checkpoint_files(self.folder)
        kept = [path for path in files if checkpoint_round(path) in kept_rounds]
        kept += files[-KEPT_CHECKPOINTS:]
        for path in set(files).difference(kept):
            path.unlink()
        self._names = {path: self._names.get(path) or self._read_names(path) for path in kept}
        self.blobs.keep(set().union(*self._names.values()))

    def _read_names(self, path: Path) -> set[str]:
        """Return the names of the blobs of a checkpoint. The names in a damaged one are unknown."""
        with suppress(CodecError, OSError), refuse_malformed():
            name = _read_name(path)
            return {name, *Head.decode(self.blobs.get(name)).names()}
        return set()


def checkpoint_name(completed: int) -> str:
    """Return the file name of the checkpoint after `completed` rounds."""
    return f"round-{completed:06}.ckpt"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder, sorted by round.

    Other files are ignored.
    """
    return sorted(
        (path for path in folder.glob("round-*.ckpt") if _NAME.fullmatch(path.name)),
        key=checkpoint_round,
    )


def checkpoint_round(path: Path) -> int:
    """Return the number of completed rounds in the file name of a checkpoint.

    Raises:
        ValueError: If the file name does not have the form of `checkpoint_name`.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: expected a file name such as {checkpoint_name(1)}, got {path}")
    return int(match[1])


@dataclass(frozen=True)
class Head:
    """Names of the blobs of a checkpoint.

    Attributes:
        tree: Names of the blobs with the state of the run without private states. Either one name,
            or nested dictionaries of names.
        committed: Name of each client's committed private state, keyed by client id.
        staged: Name of each client's staged private state, keyed by client id. The name of an empty
            state is an empty string.
    """

    tree: Any
    committed: dict[str, str]
    staged: dict[str, str]

    def encode(self) -> bytes:
        """Encode the head, with committed states as a table, because there may be a million."""
        committed = {
            # Client ids are file names, so that none contains a slash.
            "clients": "".join(f"{client}/" for client in self.committed),
            "names": as_tensor(bytes.fromhex("".join(self.committed.values()))),
        }
        return encode({"tree": self.tree, "committed": committed, "staged": self.staged}, FORM)

    @classmethod
    def decode(cls, data: bytes) -> Head:
        """Decode the return value of `encode`.

        Raises:
            CodecError: If the bytes are malformed.
        """
        head = decode(data, FORM, bounded=False)
        clients = head["committed"]["clients"].split("/")[:-1]
        digits = as_bytes(head["committed"]["names"]).hex()
        names = [digits[start : start + 64] for start in range(0, len(digits), 64)]
        return cls(head["tree"], dict(zip(clients, names, strict=True)), head["staged"])

    def names(self) -> set[str]:
        """Return all names except that of the head."""
        return {*_leaves(self.tree), *self.committed.values(), *filter(None, self.staged.values())}


class SavedState(NamedTuple):
    """Contents of a checkpoint: the state of the run without private states, and the head."""

    tree: dict[str, Any]
    head: Head


def read_checkpoint(path: Path) -> SavedState:
    """Read a checkpoint, and verify all its blobs.

    Raises:
        CodecError: If any byte of the checkpoint is damaged.
        OSError: If a file is missing or cannot be read.
        EarlierVersionError: If the checkpoint was written by an earlier version.
    """
    blobs = BlobStore(path.parent / BLOBS)
    # Anyone can write a file with a valid checksum.
    with refuse_malformed():
        head = Head.decode(blobs.get(_read_name(path)))
        for name in head.names():
            blobs.get(name)
        return SavedState(_read_tree(head.tree, blobs), head)


def _read_name(path: Path) -> str:
    """Return the name of the head of a checkpoint."""
    with open(path, "rb") as file:
        content = file.read(1000)
    if content.startswith(EARLIER):
        raise EarlierVersionError(
            f"{path}: written by an earlier version of hetero_fl; start a new run in another folder"
        )
    return content.decode()


def _read_tree(names: Any, blobs: BlobStore) -> Any:
    if isinstance(names, dict):
        return {key: _read_tree(value, blobs) for key, value in names.items()}
    return decode(blobs.get(names), FORM, bounded=False)


def _leaves(names: Any) -> list[str]:
    """Return the leaves of nested dictionaries."""
    if isinstance(names, dict):
        return [leaf for value in names.values() for leaf in _leaves(value)]
    return [names]
