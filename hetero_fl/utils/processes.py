"""Helpers for child processes: signal handling and a fork server."""

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

# Exit status of a worker process that would otherwise execute the user's script again.
UNGUARDED = 64
ADVICE = (
    "worker processes import this script again: put the call under `if __name__ == '__main__':` "
    "(all other code of the script runs in each of them)"
)


def exit_if_importing() -> None:
    """Exit if the calling process is a worker process that is importing the main script.

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
    """Make all processes that are started inside the `with` block ignore SIGINT.

    A terminal sends Ctrl-C to all processes. Only the parent process handles the signal and stops
    the child processes without tracebacks. A signal that arrives inside the block is handled at the
    end of the block. Outside the main thread, the context manager has no effect.
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
    """Return whether a process of a deployment exists on this machine, also one of another user."""
    if sys.platform == "win32":
        # Windows has no deployments, and there, `os.kill(pid, 0)` interrupts the process.
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# Modules that every worker process imports. Creating an optimizer imports torch._dynamo.
PRELOADED = ["torch._dynamo"]


def worker_context(*modules: str) -> ForkServerContext | SpawnContext:
    """Return the multiprocessing context for worker processes.

    On Linux, processes are forked from a server process that has already imported the required
    modules. The server process uses no data, threads or accelerators. On other systems, each
    process is spawned.

    Args:
        modules: Names of modules to import in the server process. Names that are passed after the
            first process has been started have no effect.
    """
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) == "<stdin>":
        # Workers would fail to import this file. Without it, they import no main module.
        del main.__file__
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])
    return context


def begin_worker(environ: Mapping[str, str]) -> None:
    """Prepare this process for the work of its parent.

    The process ends when its parent has ended, even if it is busy.

    Args:
        environ: Environment variables of the parent, which replace those of this process. A process
            that is forked from a server process starts with the variables of the server process.
    """
    os.environ.clear()
    os.environ.update(environ)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
