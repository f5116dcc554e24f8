"""What all downloads have in common: their noise is kept off the console, and every failure becomes one line."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from hetero_fl.errors import UserError

TIMEOUT = 60.0  # seconds without a byte after which a server counts as gone


@contextmanager
def downloading(name: str, root: Path) -> Iterator[Path]:
    """The folder to download into, made if need be; a progress bar shows on a terminal and nowhere else.

    Raises:
        UserError: whatever goes wrong inside, with the name of the set, the reason, and the key that helps.
    """
    stream = sys.stderr if sys.stderr.isatty() else io.StringIO()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(stream), redirect_stderr(stream):
            yield root
    except UserError:
        raise
    except Exception as error:  # the downloaders of other packages raise all sorts of things
        raise UserError(f"name: could not get {name} ({_reason(error)}); give a local file in data.path") from error
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    """The first cause, shortened: downloaders wrap it in advice of their own, one of them even an interrupt."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, KeyboardInterrupt):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
