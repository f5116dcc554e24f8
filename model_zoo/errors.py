"""The one error of this package, and the small helpers that word it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ModelError(ValueError):
    """A model that cannot be made as asked. The message is one line: which model, what was found, what would do."""


class InputError(ModelError):
    """A model that exists, but cannot take examples of this shape."""


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; the nearest are a, b"`` for the names like ``name`` (case does not count), or ``""`` where none is."""
    by_lower = {k.lower(): k for k in known}
    close = [
        prefix + by_lower[m] for m in get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    ]
    if not close:
        return ""
    return f"; the nearest {'is' if len(close) == 1 else 'are'} {', '.join(close)}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Another library's error as one line, cut to ``limit`` characters; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
