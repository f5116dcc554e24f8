"""Where a run meets code of the user's own: what a hook returns is checked, what it raises is told in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.participant import Card, Participant
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.engine.driver import Diverged
from hetero_fl.utils.errors import RunFailed, UserError, is_users

LONGEST = 300  # characters of another library's message


def is_own(algorithm: Algorithm) -> bool:
    """Whether the method is the user's, not one of this package's."""
    return not type(algorithm).__module__.startswith("hetero_fl.")


def broadcast(algorithm: Algorithm, server: Participant, card: Card) -> Payload:
    """What the method sends to a client. Raises UserError if it is no dictionary of items."""
    try:
        return Payload.of(algorithm.broadcast(server, card))
    except PayloadError as error:
        raise UserError(f"{type(algorithm).__name__}.broadcast: {error}") from None


@contextmanager
def told() -> Iterator[None]:
    """An exception from a file of the user's (a method, an objective, a model) becomes RunFailed, in one line that names
    the file and line; its cause is the exception itself. Others go through as they are.
    """
    try:
        yield
    except (UserError, RunFailed, Diverged, PayloadError):
        raise
    except Exception as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
        if not places:
            raise
        message = " ".join(str(error).split())[:LONGEST]
        where = f"{places[-1].filename}:{places[-1].lineno}, in {places[-1].name}"
        raise RunFailed(f"{where}: {type(error).__name__}: {message}") from error
