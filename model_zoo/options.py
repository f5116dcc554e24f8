"""Types of options in the signatures of backbones, which check the values of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any, Literal, TypeGuard, get_args, get_origin

from model_zoo.errors import ModelError


def is_integer(value: Any, minimum: int = 1) -> TypeGuard[int]:
    """Return whether `value` is an integer of at least `minimum`, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether `value` is a sequence, but not a string."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_count(value: Any) -> int:
    if not is_integer(value):
        raise ModelError(f"expected an integer >= 1, got {value!r}")
    return int(value)


def _check_counts(value: Any) -> tuple[int, ...]:
    counts = list(value) if is_list(value) else [value]
    if not counts or not all(is_integer(count) for count in counts):
        raise ModelError(f"expected a list of integers >= 1, got {value!r}")
    return tuple(int(count) for count in counts)


def _check_rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ModelError(f"expected a number in [0, 1), got {value!r}")
    return float(value)


def _check_optional_rate(value: Any) -> float | None:
    return None if value is None else _check_rate(value)


# The function in the annotation returns a valid value, and raises ModelError for others.
Count = Annotated[int, _check_count]
Counts = Annotated[Sequence[int], _check_counts]
Rate = Annotated[float, _check_rate]
OptionalRate = Annotated[float | None, _check_optional_rate]


def check_option(name: str, value: Any, hint: Any) -> Any:
    """Return the value of an option, with lists converted to tuples.

    Args:
        name: Name of the option, for the error message.
        value: The value to check.
        hint: Type hint of the option, which is one of the types above or lists the valid names.

    Raises:
        ModelError: If the value is not valid.
    """
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(get_args(hint))
            raise ModelError(f"option {name}: expected one of {choices}, got {value!r}")
        return value
    (check,) = hint.__metadata__
    try:
        return check(value)
    except ModelError as error:
        raise ModelError(f"option {name}: {error}") from None
