"""Incremental checkpoints of a run.

A checkpoint is a `Segment` file. The file contains the private states of clients that have changed
since the previous checkpoint, the rest of the run's state, and a head with the locations of both.
Unchanged private states remain in older files. The two newest checkpoints are kept. Older files are
removed when neither of these checkpoints refers to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hetero_fl.federation.state_store import BlobLocation, OpenSegment, Segment, StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import (
    CodecError,
    as_bytes,
    as_tensor,
    decode,
    encode,
    num_tensor_bytes,
    refuse_malformed,
)

FORM = "hetero_fl checkpoint 3"
# Maximum size in bytes of nested dictionaries that are written and read as a whole. Larger
# dictionaries are split, so that a second copy of the whole state is never in memory.
PIECE = 16 << 20
KEPT_CHECKPOINTS = 2
_NAME = re.compile(r"round-(\d{6,})\.ckpt")


class Checkpoints:
    """Checkpoints of a run, in the folder of the state store.

    If less than a quarter of a file is in use, the next checkpoint copies the part in use, and the
    file is removed later. If all clients train in every round, there are two complete files. If
    clients are sampled, the total size of the files is up to about four times the size of the
    state.

    Args:
        store: Store of the clients' private states.
        log: Function that is called with a message for each damaged checkpoint.

    Raises:
        ValueError: If the store has no folder, so that private states are only in memory.
    """

    def __init__(self, store: StateStore, log: Callable[[str], None]) -> None:
        if store.folder is None:
            raise ValueError("store: must have a folder for checkpoints, got a store in memory")
        self.store = store
        self.folder = store.folder
        self.log = log

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

        Raises:
            RunFailedError: If private state in an older file has been damaged.
        """
        path = self.folder / checkpoint_name(completed)
        segment = self.store.open_segment
        assert segment is not None
        self.store.compact_segments(replaced=path)
        pieces = _write_tree(dict(state), segment)
        segment.seal(path, _encode_head(pieces, self.store, segment, path.name))
        self.store.start_segment()
        # Later files are damaged checkpoints, which `load_newest` has skipped.
        self._remove_files_after(completed)
        self._remove_unused_files(kept_rounds)
        return path

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
        """
        # Remove an unfinished segment of a process that was killed.
        OpenSegment(self.folder).path.unlink(missing_ok=True)
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
        self.store.load_locations({}, {})
        for path in reversed(files):
            try:
                saved = read_checkpoint(path)
            except (CodecError, OSError) as error:
                fallback = "" if path == files[0] else "; using the previous checkpoint"
                self.log(f"{path.name}: damaged ({error}){fallback}")
                continue
            self.store.load_locations(saved.locations, saved.staged_locations)
            return saved.tree
        return None

    def _remove_files_after(self, completed: int) -> None:
        for path in checkpoint_files(self.folder):
            if checkpoint_round(path) > completed:
                path.unlink()

    def _remove_unused_files(self, kept_rounds: Collection[int]) -> None:
        """Remove files to which neither a kept checkpoint nor the store refers."""
        files = checkpoint_files(self.folder)
        used = self.store.files()
        kept = [path for path in files if checkpoint_round(path) in kept_rounds]
        for path in (*kept, *files[-KEPT_CHECKPOINTS:]):
            used.add(path)
            # The references of a damaged checkpoint are not needed.
            with suppress(CodecError, OSError), refuse_malformed():
                used.update(path.with_name(name) for name in _decode_head(path)["files"])
        for path in files:
            if path not in used:
                path.unlink()


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


class SavedState(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
        tree: State of the run without private states, as nested dictionaries.
        locations: Location of each client's committed private state, keyed by client id.
        staged_locations: Location of each client's staged private state, keyed by client id. The
            value is None if the state is empty.
    """

    tree: dict[str, Any]
    locations: dict[str, BlobLocation]
    staged_locations: dict[str, BlobLocation | None]


def read_checkpoint(path: Path) -> SavedState:
    """Read and verify a checkpoint.

    The checksums of all private states are verified, including states in older files.

    Raises:
        CodecError: If any byte of the checkpoint is damaged, in the file or in an older file.
        OSError: If a file is missing or cannot be read.
    """
    head = _decode_head(path)
    # Anyone can write a file with a valid checksum.
    with refuse_malformed():
        segments = [Segment.open(path.with_name(name)) for name in head["files"]]
        locations = _decode_locations(head, segments)
        staged = _decode_locations(head["waiting"], segments)
        tree = _read_tree(head["tree"], Segment.open(path))
        for location in (*locations.values(), *staged.values()):
            location.segment.verify(location)
        return SavedState(tree, locations, {**staged, **dict.fromkeys(head["nothing"])})


def _encode_head(pieces: Any, store: StateStore, segment: OpenSegment, file_name: str) -> bytes:
    """Encode the head of a segment that will have the name `file_name`."""
    locations = store.locations()
    staged = store.staged_locations()
    staged_on_disk = {c: location for c, location in staged.items() if location is not None}
    names = {
        location.segment: location.segment.path.name
        for location in (*locations.values(), *staged_on_disk.values())
    }
    names[segment] = file_name
    files = sorted(set(names.values()))
    numbers = {each: files.index(name) for each, name in names.items()}
    head = {
        "tree": pieces,
        "files": files,
        **_encode_locations(locations, numbers),
        "waiting": _encode_locations(staged_on_disk, numbers),
        "nothing": [client for client, location in staged.items() if location is None],
    }
    return encode(head, FORM)


def _decode_head(path: Path) -> dict[str, Any]:
    return decode(Segment.open(path).head(), FORM, bounded=False)


def _encode_locations(
    locations: Mapping[str, BlobLocation], numbers: Mapping[Segment, int]
) -> dict[str, Any]:
    """Encode locations as a table with one row per client.

    Args:
        locations: Locations, keyed by client id.
        numbers: Index of each segment in the list of files.
    """
    rows = [(numbers[blob.segment], blob.offset, blob.length) for blob in locations.values()]
    return {
        "clients": list(locations),
        "places": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
        "digests": as_tensor(b"".join(blob.digest for blob in locations.values())),
    }


def _decode_locations(table: Mapping[str, Any], segments: list[Segment]) -> dict[str, BlobLocation]:
    digests = as_bytes(table["digests"])
    rows = zip(table["clients"], table["places"].tolist(), strict=True)
    return {
        str(client): BlobLocation(segments[file], offset, length, digests[32 * i : 32 * (i + 1)])
        for i, (client, (file, offset, length)) in enumerate(rows)
    }


def _write_tree(tree: Any, segment: OpenSegment) -> Any:
    """Write nested dictionaries to a segment, and return the location.

    If the dictionary is larger than `PIECE`, each value is written separately, and a dictionary of
    locations is returned.
    """
    if isinstance(tree, dict) and num_tensor_bytes(tree) > PIECE:
        return {key: _write_tree(value, segment) for key, value in tree.items()}
    location = segment.append(encode(tree, FORM))
    return [location.offset, location.length, location.digest.hex()]


def _read_tree(pieces: Any, segment: Segment) -> Any:
    if isinstance(pieces, dict):
        return {key: _read_tree(value, segment) for key, value in pieces.items()}
    offset, length, digest = pieces
    location = BlobLocation(segment, offset, length, bytes.fromhex(digest))
    return decode(location.read(), FORM, bounded=False)
