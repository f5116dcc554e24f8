"""Record the calls of functions, which are carried out as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def record_calls(
    patch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    note: Callable[..., Any],
    notes: list[Any] | None = None,
) -> list[Any]:
    """Record a note of each call of a function, made before the function runs.

    Args:
        patch: Replaces the function until the end of the test.
        owner: The class, object or module that has the function.
        name: Name of the function.
        note: Function of the arguments, including `self` for a method of a class.
        notes: List to which notes are added, to record several functions in order.
    """
    plain = getattr(owner, name)
    seen = [] if notes is None else notes

    def recorded(*arguments: Any, **named: Any) -> Any:
        seen.append(note(*arguments, **named))
        return plain(*arguments, **named)

    patch.setattr(owner, name, recorded)
    return seen


def record_results(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Record what each call of a function returns; see `record_calls`."""
    plain = getattr(owner, name)
    results: list[Any] = []

    def recorded(*arguments: Any, **named: Any) -> Any:
        results.append(plain(*arguments, **named))
        return results[-1]

    patch.setattr(owner, name, recorded)
    return results
