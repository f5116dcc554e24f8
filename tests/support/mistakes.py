"""Check that mistakes of a user, such as a malformed folder, raise one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hetero_fl.utils.errors import RunFailedError, UserError

Mistake = tuple[type[Exception], str, Callable[[], Any]]
"""Expected exception, pattern of its message, and the mistake."""


def check_raises_one_line(mistake: Mistake) -> None:
    """Check that a mistake raises an exception whose message is one line."""
    kind, words, make = mistake
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError | TypeError | RunFailedError)


def check_folder_is_refused(folder: Path, words: str, read: Callable[[], Any]) -> None:
    """Check that a malformed folder raises one line that names the key and the place.

    Args:
        folder: The folder.
        words: Part of the message, in which `DIR` stands for the folder.
        read: Function that reads the folder as the main data set.
    """
    with pytest.raises(UserError) as refused:
        read()

    message = str(refused.value)
    assert words.replace("DIR", str(folder)) in message, message
    assert message.startswith("data.") and "\n" not in message
