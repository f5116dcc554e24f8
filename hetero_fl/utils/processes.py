"""Start child processes: signal handling and a fork server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

# Exit status of a worker process that would execute the user's script again.
UNGUARDED = 64
ADVICE = (
    "worker processes import this script again: put the call under `if __name__ == '__main__':` "
    "(all other code of the script runs in each of them)"
)


def exit_if_importing() -> None:
    """Exit if a worker process gets here while it imports the main script.

    The exit status is `UNGUARDED`, for which the parent process prints `ADVICE`.
    """
    # multiprocessing sets this attribute while a new process imports the main module.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.stdout.flush()
        sys.stderr.flush()
        # A fork server converts SystemExit to status 1.
        os._exit(UNGUARDED)


@contextmanager
def ignore_interrupts_in_children() -> Iterator[None]:
    """Start processes inside the `with` block that ignore SIGINT.

    A terminal sends Ctrl-C to all processes; the parent alone reacts and ends the others without
    tracebacks. In the parent the signal is delayed until the end of the block.
    """
    # Only the main thread can set a handler.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    # Child processes inherit the signals that this thread blocks.
    block = getattr(signal, "pthread_sigmask", None)
    if block:
        # If multiprocessing started its resource tracker later, it would unblock the signal.
        resource_tracker.ensure_running()
    mask = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, previous)
        if received:
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


# Modules that every worker process imports: creating an optimizer imports torch._dynamo.
PRELOADED = ["torch._dynamo"]


def worker_context(*modules: str) -> ForkServerContext | SpawnContext:
    """Return the multiprocessing context for worker processes.

    On Linux, processes are forked from a server that has imported the required modules, so the
    modules are imported only once. The server uses no data, threads or accelerators. On other
    systems each process is spawned.

    Args:
        modules: Modules to import in the server; effective before its first process starts.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    return context


def adopt_environment(environ: Mapping[str, str]) -> None:
    """Replace the environment variables of this process, which a fork server may have kept."""
    os.environ.clear()
    os.environ.update(environ)
