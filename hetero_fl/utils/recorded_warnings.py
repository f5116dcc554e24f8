"""Warnings of worker processes, which the process of the user issues once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class RecordedWarning(NamedTuple):
    """A warning that another process can issue.

    Attributes:
        text: The message.
        category: The nearest built-in category.
        file: Source file of the code that has issued the warning.
        line: Line in the file.
    """

    text: str
    category: type[Warning]
    file: str
    line: int


@contextmanager
def record_warnings() -> Iterator[list[RecordedWarning]]:
    """Collect the warnings of a block, instead of printing them, in the list that is returned.

    Example:
        >>> import warnings
        >>> from hetero_fl.utils.recorded_warnings import record_warnings
        >>> with record_warnings() as recorded:
        ...     warnings.warn("few rows")
        >>> recorded[0].text
        'few rows'
    """
    recorded: list[RecordedWarning] = []
    with warnings.catch_warnings(record=True) as caught:
        # The filters of the process that issues the warnings apply.
        warnings.simplefilter("default")
        try:
            yield recorded
        finally:
            for each in caught:
                kinds = (kind for kind in each.category.__mro__ if kind.__module__ == "builtins")
                recorded.append(
                    RecordedWarning(str(each.message), next(kinds), each.filename, each.lineno)
                )


def issue_warnings(recorded: Iterable[RecordedWarning], issued: set[RecordedWarning]) -> None:
    """Issue the warnings that are not in `issued`, and add them to the set."""
    for warning in recorded:
        if warning not in issued:
            issued.add(warning)
            warnings.warn_explicit(*warning)
