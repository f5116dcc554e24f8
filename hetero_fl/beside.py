"""A process beside this one that is started early, so that what it imports and what is imported here take the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hetero_fl.errors import RunFailed


class Beside:
    """A module run as a process of its own: it reads lines, and has to end when its standard input does."""

    def __init__(self, module: str) -> None:
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],  # -P: the folder that one is in is not searched for modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C in a terminal is ours to hear
        )

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def tell(self, told: Any) -> None:
        """Send a line of JSON."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `check` tells why
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def check(self) -> None:
        """Raises RunFailed, in its words, if it has ended."""
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            words = self._process.stdout.read().decode(errors="replace").strip()
            raise RunFailed(words or f"a process beside this one ended with status {self._process.returncode}")
