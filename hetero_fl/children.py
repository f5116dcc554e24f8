"""Processes that a run starts: they leave Ctrl-C to their parent, and do not run the user's script a second time."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

UNGUARDED = 64  # exit status of a process that found itself running the script once more
ADVICE = (
    "processes are started that import this script again: put the call under `if __name__ == '__main__':` "
    "(what stands outside of it runs in each of them)"
)


def leave_if_importing() -> None:
    """End a worker process, silently, that has come here while it imports the script; its parent tells the one line."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own sign of this moment
        raise SystemExit(UNGUARDED)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started here do not hear Ctrl-C, which a terminal sends to all: the parent ends them, without tracebacks.

    The parent hears it when all have been started.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    block = getattr(signal, "pthread_sigmask", None)  # what is blocked in this thread is blocked in its children
    if block:
        resource_tracker.ensure_running()  # multiprocessing's own; started later, it would unblock the signal again
    mask = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)
