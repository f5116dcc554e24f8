"""Calls to the SuperLink: what goes wrong, told apart by what is to be done about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.supercore.error import FlowerError

from hetero_fl.errors import RunFailed, UserError


class Unreachable(Exception):
    """Nobody answers, for the moment perhaps."""


class Refused(Exception):
    """The SuperLink does not know this caller, or no longer."""


class Over(Exception):
    """The run that a message belongs to is no longer."""


@contextmanager
def calling(address: str) -> Iterator[None]:
    """Raises Unreachable, Refused or Over; UserError if the other end is not who it should be; RunFailed for the rest."""
    try:
        yield
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
            raise UserError(f"{address}: the server's certificate is refused ({_reason(error)})") from None
        if "WRONG_VERSION_NUMBER" in str(error) or "wrong version number" in str(error):
            raise UserError(f"{address}: the server does not speak TLS; it was started without certificates") from None
        raise Unreachable(f"{address}: {error or type(error).__name__}") from None
    except httpx.HTTPStatusError as error:
        status, told = error.response.status_code, _told(error.response)
        if status in (401, 412):
            raise Refused(told) from None
        if status == 403:
            raise Over(told) from None
        if status >= 500:
            raise Unreachable(f"{address}: {told}") from None
        raise RunFailed(f"{address}: Flower's SuperLink answered {status} ({told})") from None


def _told(response: httpx.Response) -> str:
    error = FlowerError.from_json(response.text)
    return " ".join((error.message if error else response.text or response.reason_phrase).split())


def _reason(error: Exception) -> str:
    """`self-signed certificate` out of OpenSSL's `[SSL: …] certificate verify failed: self-signed certificate (_ssl.c:1000)`."""
    return str(error).split("verify failed: ")[-1].rsplit(" (_ssl", 1)[0]
