"""What is written in a row on a command line, in its pieces: a separator within brackets or braces is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

OPEN = "[{("
CLOSED = "]})"


def split_top_level(text: str, separator: str) -> list[str]:
    """The text between separators (one character) that stand outside all brackets; of `a,b=[1,2]` these are `a` and `b=[1,2]`."""
    return list(_split_top_level(text, separator))


def _split_top_level(text: str, separator: str) -> Iterator[str]:
    begin = depth = 0
    for at, character in enumerate(text):
        if character in OPEN:
            depth += 1
        elif character in CLOSED:
            depth = max(0, depth - 1)
        elif character == separator and not depth:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]


def format_list(names: Iterable[str], most: int = 8, quote: bool = False) -> str:
    """Return the first names and how many others there are: `a, b and 3 more`."""
    listed = [f"'{name}'" if quote else name for name in names]
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def pluralize(count: int, noun: str) -> str:
    """`1 round`, `12 rounds`, `2,000 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
