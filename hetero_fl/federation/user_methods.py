"""Where a run meets code of the user's own: what a hook returns is checked, what it raises is told in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Payload, PayloadError
from hetero_fl.engine.driver import DivergedError
from hetero_fl.utils.errors import RunFailedError, UserError, is_user_code
from hetero_fl.utils.version import describe_new_name

LONGEST = 300  # characters of another library's message


def is_user_method(algorithm: Algorithm) -> bool:
    """Whether the method is the user's, not one of this package's."""
    return not type(algorithm).__module__.startswith("hetero_fl.")


def call_broadcast(algorithm: Algorithm, server: Participant, client_info: ClientInfo) -> Payload:
    """What the method sends to a client. Raises UserError if it is no dictionary of items."""
    try:
        return Payload.from_hook(algorithm.broadcast(server, client_info))
    except PayloadError as error:
        raise UserError(f"{type(algorithm).__name__}.broadcast: {error}") from None


@contextmanager
def translate_user_errors() -> Iterator[None]:
    """An exception from a file of the user's (a method, an objective, a model) becomes RunFailedError, in one line that names
    the file and line; its cause is the exception itself. Others go through as they are.
    """
    try:
        yield
    except (UserError, RunFailedError, DivergedError, PayloadError):
        raise
    except Exception as error:
        places = [f for f in traceback.extract_tb(error.__traceback__) if is_user_code(f.filename)]
        if not places:
            raise
        message = " ".join(str(error).split())[:LONGEST] + describe_new_name(error)
        where = f"{places[-1].filename}:{places[-1].lineno}, in {places[-1].name}"
        raise RunFailedError(f"{where}: {type(error).__name__}: {message}") from error
