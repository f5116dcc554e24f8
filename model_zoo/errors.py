"""The exceptions of model_zoo and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ModelError(ValueError):
    """Raised when a model cannot be created.

    The message is one line that names the model, the argument, the value found and what is valid.

    Example:
        >>> from model_zoo import ModelError, create_model
        >>> try:
        ...     create_model("resnet8x", num_classes=10)
        ... except ModelError as error:
        ...     print(error)
        model resnet8x: unknown model; did you mean 'resnet8', 'resnet18' or 'resnet'?
    """


class InputError(ModelError):
    """Raised when a model exists but does not accept examples of the given shape."""


def suggest_names(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return a hint with the known names that are most similar to a name.

    Args:
        name: The name that was not found. The comparison ignores case.
        known: All valid names.
        prefix: Text to put before each suggested name.

    Returns:
        Text such as `; did you mean 'a' or 'b'?`, or an empty string if no name is similar.
    """
    by_lower = {k.lower(): k for k in known}
    close = [
        f"'{prefix}{by_lower[match]}'"
        for match in get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    ]
    if not close:
        return ""
    names = close[0] if len(close) == 1 else f"{', '.join(close[:-1])} or {close[-1]}"
    return f"; did you mean {names}?"


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the message of an error as one line of at most `limit` characters.

    Longer messages are shortened. If the error has no message, the name of the error's type is
    returned.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
