"""Check that a mistake of a user raises one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hetero_fl.utils.errors import RunFailedError

Mistake = tuple[type[Exception], str, Callable[[], Any]]
"""Expected exception, pattern of its message, and the mistake."""


def check_raises_one_line(mistake: Mistake) -> None:
    """Check that a mistake raises an exception whose message is one line."""
    kind, words, make = mistake
    with pytest.raises(kind, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError | TypeError | RunFailedError)
