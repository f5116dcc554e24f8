"""Scripts without a `__main__` guard: a worker process imports the script anew, and must not start its runs again."""

from __future__ import annotations

import multiprocessing

UNGUARDED = 64  # exit status of a worker that found itself running the script once more
ADVICE = (
    "compare starts processes that import this script again: put the call under `if __name__ == '__main__':` "
    "(what stands outside of it runs in each of them)"
)


def leave_if_importing() -> None:
    """End a worker process, silently, that has come here while it imports the script; its parent tells the one line."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing's own sign of this moment
        raise SystemExit(UNGUARDED)
