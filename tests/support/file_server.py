"""A server on this machine that stands in for the servers of published data sets."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve the files of a folder and yield the address, which ends with a slash."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=partial(httpd.serve_forever, 0.01), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def md5(data: bytes) -> str:
    """Return the MD5 checksum of data."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def publish(
    folder: Path,
    archive: str,
    server: tuple[str, Path],
    source: ModuleType,
    patch: pytest.MonkeyPatch,
) -> Path:
    """Serve the archive of a folder in place of the published one, and return the archive.

    Args:
        folder: The folder.
        archive: File name of the archive.
        server: Address of a server and the folder that it serves, as the fixture `server`.
        source: Module with the address and the checksum of the published archive.
        patch: Replaces both.
    """
    address, served = server
    path = served / archive
    kind = {".zip": "zip", ".gz": "gztar"}[path.suffix]
    shutil.make_archive(str(path).removesuffix(".zip").removesuffix(".tar.gz"), kind, folder)
    patch.setattr(source, "URL", address + archive)
    patch.setattr(source, "MD5", md5(path.read_bytes()))
    return path
