"""Functions for text: splitting outside brackets, lists of names, plurals, and notes of runs."""

from __future__ import annotations

from collections.abc import Iterable

OPENING = "[{("
CLOSING = "]})"


def split_top_level(text: str, separator: str) -> list[str]:
    """Split a text at each occurrence of a separator outside brackets.

    The separator is a single character.

    Example:
        >>> from hetero_fl.utils.text import split_top_level
        >>> split_top_level("a,b=[1,2]", ",")
        ['a', 'b=[1,2]']
    """
    parts = []
    start = 0
    depth = 0
    for index, character in enumerate(text):
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth = max(0, depth - 1)
        elif character == separator and not depth:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return parts


def format_list(names: Iterable[str], max_names: int = 8, quote: bool = False) -> str:
    """Join names with commas and count the names beyond a maximum.

    Args:
        names: The names.
        max_names: Maximum number of names to list.
        quote: Whether to put names in single quotes.

    Example:
        >>> from hetero_fl.utils.text import format_list
        >>> format_list(["a", "b", "c"], max_names=2)
        'a, b and 1 more'
    """
    listed = [f"'{name}'" if quote else name for name in names]
    more = f" and {len(listed) - max_names:,} more" if len(listed) > max_names else ""
    return ", ".join(listed[:max_names]) + more


def pluralize(count: int, noun: str) -> str:
    """Return a count followed by a noun, such as `1 round` or `2,000 rows`.

    The plural is formed by adding `s`.
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


class Caution(str):
    """A note on a run that says that results may be wrong.

    Other notes are plain strings. A caution is logged at level WARNING, so that Python and the
    command line show it by default.

    Example:
        >>> from hetero_fl.utils.text import Caution, prefix_note
        >>> prefix_note("clients: 'a'", Caution("no test rows"))
        Caution("clients: 'a': no test rows")
    """

    def __repr__(self) -> str:
        return f"Caution({super().__repr__()})"


def prefix_note(where: str, note: str) -> str:
    """Return a note that starts with a place, and that is a caution if `note` is one."""
    return type(note)(f"{where}: {note}")
