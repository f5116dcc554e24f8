"""Check that mistakes of a user, such as a malformed folder, raise one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import RunFailedError, UserError
from tests.support.federations import config

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


def check_table(subtests: pytest.Subtests, path: Path) -> None:
    """Check that each mistake of a table raises one line with the words of its entry.

    The file is a mapping of `import` (names of objects, such as `hfl: hetero_fl` or
    `images: tests.support.python_federations:images`), `names` (expressions that entries may use,
    in order) and `mistakes`, a list of entries:

    - `python`: an expression, or
    - `config`: changes of a small federation, with dots in keys, and `set`: a list of overrides;
    - `says`: words that the message contains, a text or a list;
    - `raises`: name of the exception, by default `UserError`.

    Args:
        subtests: The fixture of pytest.
        path: The file.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = {name: resolve_name(place) for name, place in table.get("import", {}).items()}
    for name, expression in table.get("names", {}).items():
        names[name] = eval(expression, names)
    for entry in table["mistakes"]:
        said = [entry["says"]] if isinstance(entry["says"], str) else entry["says"]
        with subtests.test(mistake=str(entry.get("python") or entry)):
            with pytest.raises(Exception) as caught:
                _make(entry, names)
            message = str(caught.value)
            assert type(caught.value).__name__ == entry.get("raises", "UserError"), message
            assert "\n" not in message
            assert [words for words in said if words not in message] == [], message


def _make(entry: Mapping[str, Any], names: dict[str, Any]) -> None:
    if "python" in entry:
        eval(entry["python"], names)
        return
    changes = {key.replace(".", "__"): value for key, value in entry.get("config", {}).items()}
    prepare(config(**changes), entry.get("set", ()))
