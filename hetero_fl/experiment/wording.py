"""Messages for callers that pass objects, in which arguments replace configuration keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hetero_fl.utils.errors import ArgumentError, UserError

ARGUMENTS = {
    "clients.common": "common",
    "clients.per_round": "per_round",
    "clients.defaults": "defaults",
    "data.label": "label",
    "data.name": "data",
    "data.partition": "partition",
    "data.patient": "patient",
    "data.proxy.size": "proxy",
    "data.proxy.source": "proxy",
    "data.task": "task",
}
"""Arguments of `Federation`, keyed by the key that they set."""
PHRASES = (
    (r"set data\.task=(\w+)", r"pass task='\1'"),
    (r"set data\.path to a common file", "pass test"),
    (r"name their column in data\.group", "pass hetero_fl.data.from_arrays(..., group=...)"),
    (r"(for categories, )?list (the|its) values in data\.categories", "convert it to one type"),
    (r"set data\.size to resize all images", "resize all images"),
    (r"columns\.input: missing; choose from (.*)", r"keep one input column of \1"),
    (r"; set data\.text for other settings", ""),
    (
        r"set data\.proxy\.size > 0 to make training rows public, or data\.proxy\.source",
        "pass proxy=..., which is public data or a number of training rows",
    ),
    (
        r"set clients\.defaults\.preprocess\.missing=indicate",
        "pass preprocess=Preprocess(missing='indicate')",
    ),
    (
        r"exclude the column by clients\.defaults\.preprocess\.columns",
        "pass preprocess=Preprocess(columns=[...]) with the other columns",
    ),
    (r"set data\.proxy\.source to other data", "pass other data as proxy"),
    (r"; text\.length counts them", ""),
    (rf"set ({'|'.join(map(re.escape, ARGUMENTS))})\b(?!\.\w)", r"pass \1"),
    (r"set (?=(?:data|clients)\.)", "use overrides to set "),
)
"""Patterns of advice that names keys, and the same advice for arguments."""


def with_arguments(line: str, overrides: Sequence[str] = (), main: str = "`data`") -> str:
    """Return a message in which arguments of `Federation` replace configuration keys.

    Args:
        line: The message, whose class is kept.
        overrides: Overrides of the caller, whose keys are not replaced.
        main: What the program has passed as the main data set.
    """
    text = str(line).replace("the main data set", main)
    for pattern, phrase in PHRASES:
        text = re.sub(pattern, phrase, text)
    given = [override.partition("=")[0] for override in overrides]
    for key, argument in ARGUMENTS.items():
        if any(override.startswith(key) for override in given):
            continue
        # Settings below an argument keep their key, which overrides set.
        text = re.sub(rf"\b{re.escape(key)}\b(?!\.\w)", argument, text)
    return type(line)(text)


@contextmanager
def errors_with_arguments(overrides: Sequence[str] = (), main: str = "`data`") -> Iterator[None]:
    """Raise errors with messages that name arguments (see `with_arguments`)."""
    try:
        yield
    except UserError as error:
        kind = ArgumentError if isinstance(error, ArgumentError) else UserError
        raise kind(with_arguments(str(error), overrides, main)) from error
