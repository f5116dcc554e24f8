"""Checkpoints: a file a round that holds what changed, complete on disk or not there at all, the two newest kept.

A checkpoint is a segment (`state_store.py`): the private state of the clients that changed it in this round, written while the
round ran; the rest of the run's state; and a head that says where everything lies. State that did not change stays where it
is, in an older file, which is kept for as long as one of the two newest checkpoints refers to it. A file of which less than a
quarter is still live is given up: the next checkpoint takes a copy of what is live. So a run in which everybody takes part
has exactly two files, each complete in itself, and one with cohorts has at most about four times the bytes of its state.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_fl.federation.state_store import BlobLocation, OpenSegment, Segment, StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import CodecError, decode, encode, num_tensor_bytes

FORM = "hetero_fl checkpoint 3"
# bytes: larger trees are written and read in pieces, so that they are not in memory twice
PIECE = 16 << 20
KEPT_CHECKPOINTS = 2
_NAME = re.compile(r"round-(\d{6,})\.ckpt")


class Checkpoints:
    """The checkpoints of a run, in a folder of their own, together with the store whose state they hold."""

    def __init__(self, store: StateStore, log: Callable[[str], None]) -> None:
        if store.folder is None:
            raise ValueError("a store that lives in memory only has no checkpoints")
        self.store = store
        self.folder = store.folder
        self.log = log

    def save(self, completed: int, state: Mapping[str, Any]) -> Path:
        """Write the state after so many rounds: `state`, and what the store has committed.

        Raises RunFailedError if private state in an older file has been damaged.
        """
        path = self.folder / checkpoint_name(completed)
        segment = self.store.open
        assert segment is not None
        self.store.compact_segments(replaced=path)
        pieces = _write_tree(dict(state), segment)
        segment.seal(
            path,
            _head(
                pieces, self.store.locations(), self.store.staged_locations(), segment, path.name
            ),
        )
        self.store.start_segment()
        for later in [p for p in self._files() if p.name > path.name]:
            later.unlink()  # damaged ones that the run has gone back behind
        self._prune()
        return path

    def load_newest(self) -> dict[str, Any] | None:
        """The newest tree that is whole, its private state in the store; says so where a newer one is not whole.

        None if there is no checkpoint. Raises RunFailedError if there are checkpoints and none of them is whole.
        """
        OpenSegment(self.folder).path.unlink(missing_ok=True)  # of a process that was killed
        files = self._files()
        if (tree := self._load_first_complete(files)) is None and files:
            raise RunFailedError(
                f"{self.folder}: no whole checkpoint is left; start anew with another --out"
            )
        return tree

    def load_before(self, completed: int) -> dict[str, Any] | None:
        """Return the newest whole tree after fewer rounds, its private state in the store, and delete later checkpoints.

        Returns None, and deletes nothing, if there is none; the store then holds nothing.
        """
        files = [path for path in self._files() if path.name < checkpoint_name(completed)]
        tree = self._load_first_complete(files)
        if tree is not None:
            for later in self._files()[len(files) :]:
                later.unlink()
        return tree

    def _load_first_complete(self, files: list[Path]) -> dict[str, Any] | None:
        self.store.load_locations({}, {})
        for i, path in reversed(list(enumerate(files))):
            try:
                tree, places, waiting = read_checkpoint(path)
            except (CodecError, OSError) as error:
                self.log(
                    f"{path.name} is damaged ({error})" + ("; using the one before it" if i else "")
                )
                continue
            self.store.load_locations(places, waiting)
            return tree
        return None

    def _files(self) -> list[Path]:
        return checkpoint_files(self.folder)

    def _prune(self) -> None:
        """Remove the files to which neither of the two newest checkpoints refers."""
        needed = self.store.files()
        for path in self._files()[-KEPT_CHECKPOINTS:]:
            needed.add(path)
            with suppress(CodecError, OSError):  # a damaged one needs nothing any more
                needed |= {
                    path.with_name(name)
                    for name in decode(Segment.open(path).head(), FORM, bounded=False)["files"]
                }
        for path in self._files():
            if path not in needed:
                path.unlink()


def checkpoint_name(completed: int) -> str:
    """Return the file name of the checkpoint after so many rounds."""
    return f"round-{completed:06}.ckpt"


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest last; files with other names are left out."""
    return sorted(
        (path for path in folder.glob("round-*.ckpt") if _NAME.fullmatch(path.name)),
        key=checkpoint_round,
    )


def checkpoint_round(path: Path) -> int:
    """Return the number of rounds after which a checkpoint was written, from its file name.

    Raises:
        ValueError: If it is not the name of a checkpoint.
    """
    if (match := _NAME.fullmatch(path.name)) is None:
        raise ValueError(f"{path}: expected a file name such as {checkpoint_name(1)}")
    return int(match[1])


def read_checkpoint(
    path: Path,
) -> tuple[dict[str, Any], dict[str, BlobLocation], dict[str, BlobLocation | None]]:
    """The tree in a checkpoint file, and where each client's private state lies, committed and staged; all of it verified.

    Raises CodecError if a single byte of it, here or in an older file, is not what was written; OSError if a file is gone.
    """
    pieces, places, waiting = _read_head(path)
    tree: dict[str, Any] = _read_tree(pieces, Segment.open(path))
    for place in (*places.values(), *(place for place in waiting.values() if place is not None)):
        place.segment.verify(place)
    return tree, places, waiting


# The head: pieces of the tree by their keys, and the clients with the places of their state, in order ------------------
def _head(
    pieces: Any,
    places: Mapping[str, BlobLocation],
    waiting: Mapping[str, BlobLocation | None],
    segment: Segment,
    name: str,
) -> bytes:
    staged = {c: p for c, p in waiting.items() if p is not None}
    names = {p.segment: p.segment.path.name for p in (*places.values(), *staged.values())}
    names[segment] = name  # it has its own name only later
    files = sorted(set(names.values()))

    def rows(of: Mapping[str, BlobLocation]) -> dict[str, Any]:
        lie = [(files.index(names[p.segment]), p.offset, p.length) for p in of.values()]
        return {
            "clients": list(of),
            "places": torch.tensor(lie, dtype=torch.int64).reshape(-1, 3),
            "digests": _bytes_tensor(b"".join(p.digest for p in of.values())),
        }

    nothing = [c for c, p in waiting.items() if p is None]
    tree = {
        "tree": pieces,
        "files": files,
        **rows(places),
        "waiting": rows(staged),
        "nothing": nothing,
    }
    return encode(tree, FORM)


def _read_head(path: Path) -> tuple[Any, dict[str, BlobLocation], dict[str, BlobLocation | None]]:
    head = decode(Segment.open(path).head(), FORM, bounded=False)
    segments = [Segment.open(path.with_name(name)) for name in head["files"]]

    def places(of: Mapping[str, Any]) -> dict[str, BlobLocation]:
        digests = of["digests"].numpy().tobytes()
        lie = zip(of["clients"], of["places"].tolist(), strict=True)
        return {
            client: BlobLocation(segments[file], offset, length, digests[32 * i : 32 * (i + 1)])
            for i, (client, (file, offset, length)) in enumerate(lie)
        }

    return head["tree"], places(head), {**places(head["waiting"]), **dict.fromkeys(head["nothing"])}


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _write_tree(tree: Any, segment: OpenSegment) -> Any:
    """The places of a tree's pieces, as lists, in dictionaries where the tree was too large for one."""
    if isinstance(tree, dict) and num_tensor_bytes(tree) > PIECE:
        return {key: _write_tree(value, segment) for key, value in tree.items()}
    place = segment.append(encode(tree, FORM))
    return [place.offset, place.length, place.digest.hex()]


def _read_tree(pieces: Any, segment: Segment) -> Any:
    if isinstance(pieces, dict):
        return {key: _read_tree(value, segment) for key, value in pieces.items()}
    offset, length, digest = pieces
    return decode(
        BlobLocation(segment, offset, length, bytes.fromhex(digest)).read(), FORM, bounded=False
    )
