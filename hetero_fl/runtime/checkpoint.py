"""Checkpoints: one file a round, written atomically, each with a checksum, the two newest kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hetero_fl.codec import CodecError, decode, encode
from hetero_fl.errors import RunFailed
from hetero_fl.files import write_atomically

FORM = "hetero_fl checkpoint 1"
KEPT = 2
MAGIC = b"HFLCKPT1"


class Checkpoints:
    """The checkpoints of a run, in a folder of their own."""

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self.folder, self.log = folder, log

    def save(self, round: int, tree: dict[str, Any]) -> Path:
        """Write the state after so many rounds; it is complete on disk, or not there at all."""
        body = encode(tree, FORM)
        path = self.folder / f"round-{round:06}.ckpt"
        write_atomically(path, MAGIC + hashlib.sha256(body).digest() + body)
        for old in self._files()[:-KEPT]:
            old.unlink()
        return path

    def newest(self) -> dict[str, Any] | None:
        """The newest state that is whole; says so where a newer one is not. None if there is no checkpoint.

        Raises RunFailed if there are checkpoints and none of them is whole.
        """
        files = self._files()
        for i, path in reversed(list(enumerate(files))):
            try:
                return read_checkpoint(path)
            except (CodecError, OSError) as error:
                self.log(f"{path.name} is damaged ({error})" + ("; using the one before it" if i else ""))
        if files:
            raise RunFailed(f"{self.folder}: no whole checkpoint is left; start anew with another --out")
        return None

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.ckpt"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file. Raises CodecError if a single byte of it is not what was written."""
    data = path.read_bytes()
    head, digest, body = data[:8], data[8:40], data[40:]
    if head != MAGIC:
        raise CodecError("not a checkpoint, or its first bytes are gone")
    if hashlib.sha256(body).digest() != digest:
        raise CodecError("its checksum does not match")
    tree: dict[str, Any] = decode(body, FORM)
    return tree
