"""Start child processes: signal handling, a fork server, and early imports in a helper process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_fl.utils.errors import RunFailedError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

# Processes that a run starts: they leave Ctrl-C to their parent, and do not run the user's script a
# second time.

UNGUARDED = 64  # exit status of a process that found itself running the script once more
ADVICE = (
    "processes are started that import this script again: put the call under `if __name__ == '__main__':` "
    "(what stands outside of it runs in each of them)"
)


def exit_if_importing() -> None:
    """End a worker process, silently, that has come here while it imports the script; its parent tells the one line."""
    # multiprocessing's own sign of this moment
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(UNGUARDED)  # a fork server would take SystemExit for status 1


@contextmanager
def ignore_interrupts_in_children() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C, which a terminal sends to all: the parent ends them, without tracebacks.

    The parent hears it when all have been started.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    # what is blocked in this thread is blocked in its children
    block = getattr(signal, "pthread_sigmask", None)
    if block:
        # multiprocessing's own; started later, it would unblock the signal again
        resource_tracker.ensure_running()
    mask = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def is_process_running(pid: int) -> bool:
    """Return whether a process exists on this machine, of this or another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# What every worker process imports: the first optimizer imports torch._dynamo.
PRELOADED = ["torch._dynamo"]


def worker_context(*modules: str) -> ForkServerContext | SpawnContext:
    """Return the multiprocessing context for worker processes.

    On Linux processes are forked from a server that has imported what they need, so that all of
    them together take the time of one import; it holds no data, no threads and no accelerator.
    Elsewhere each process is spawned.

    Args:
        modules: Modules to import. Those of the first process that is started count.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    return context


def adopt_environment(environ: Mapping[str, str]) -> None:
    """Replace the environment variables of this process, which a fork server may have kept for long."""
    os.environ.clear()
    os.environ.update(environ)


# A process beside this one that is started early, so that what it imports and what is imported here
# take the same time.


class CompanionProcess:
    """A module run as a process of its own: it reads lines, and has to end when its standard input does."""

    def __init__(self, module: str) -> None:
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            # -P: the folder that one is in is not searched for modules
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C in a terminal is ours to hear
        )

    def __enter__(self) -> CompanionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def send(self, message: Any) -> None:
        """Send a line of JSON."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `check` tells why
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def check(self) -> None:
        """Raises RunFailedError, in its words, if it has ended."""
        if self._process.poll() is not None:
            assert self._process.stdout is not None
            words = self._process.stdout.read().decode(errors="replace").strip()
            raise RunFailedError(
                words or f"a process beside this one ended with status {self._process.returncode}"
            )
