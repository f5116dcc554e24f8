"""Run a test for many cheap cases as subtests of one item."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import pytest


def each_case(
    names: str | tuple[str, ...], values: Iterable[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test for each case, in the form of `pytest.mark.parametrize`, as a subtest.

    The cases share the fixtures of the test, except that each has its own `tmp_path` and that
    what it changes with `monkeypatch` is undone after it.

    Args:
        names: Name of a parameter of the test, or names.
        values: The values of the parameter for each case, or tuples of values.
    """
    parameters = (names,) if isinstance(names, str) else names
    cases = [(value,) if isinstance(names, str) else value for value in values]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def run_cases(*, subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, case in enumerate(cases):
                given = dict(zip(parameters, case, strict=True))
                with (
                    subtests.test(f"case {number}", **given),
                    pytest.MonkeyPatch.context() as patch,
                ):
                    own = _own_fixtures(fixtures, number, patch)
                    test(**own, **given)

        kept = [p for p in inspect.signature(test).parameters.values() if p.name not in parameters]
        fixture = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
        run_cases.__signature__ = inspect.Signature([*kept, fixture])  # type: ignore[attr-defined]
        return run_cases

    return decorate


def _own_fixtures(
    fixtures: dict[str, Any], number: int, patch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return the fixtures of a case."""
    own = dict(fixtures)
    if "tmp_path" in own:
        own["tmp_path"] = own["tmp_path"] / str(number)
        own["tmp_path"].mkdir()
    if "monkeypatch" in own:
        own["monkeypatch"] = patch
    return own
