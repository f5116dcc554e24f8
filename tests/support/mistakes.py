"""Check that mistakes of a user, such as a malformed folder, raise one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

from hetero_fl.cli import main
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.utils.errors import UserError
from tests.support.federations import config


def refusal(action: Callable[..., object], /, *arguments: Any, **keys: Any) -> str:
    """Call a function that must raise a `UserError` of one line, and return the line."""
    with pytest.raises(UserError) as refused:
        action(*arguments, **keys)

    message = str(refused.value)
    assert "\n" not in message, message
    return message


def check_refused(
    pattern: str, action: Callable[..., object], /, *arguments: Any, **keys: Any
) -> str:
    """Check that a function raises a `UserError` of one line, and return the line.

    Args:
        pattern: Regular expression that the line contains.
        action: The function.
        *arguments: Positional arguments of the function.
        **keys: Keyword arguments of the function.
    """
    message = refusal(action, *arguments, **keys)
    assert re.search(pattern, message), message
    return message


def check_folder_is_refused(folder: Path, words: str, read: Callable[[], Any]) -> None:
    """Check that a malformed folder raises one line that names the key and the place.

    Args:
        folder: The folder.
        words: Part of the message, in which `DIR` stands for the folder.
        read: Function that reads the folder as the main data set.
    """
    message = refusal(read)
    assert words.replace("DIR", str(folder)) in message, message
    assert message.startswith("data.")


def check_broken_folders(
    subtests: pytest.Subtests,
    cases: Iterable[tuple[str, Callable[[Path], object], Mapping[str, Any], str]],
    write: Callable[[Path], Path],
    read: Callable[..., Any],
) -> None:
    """Check that each damage of a folder raises one line that names the key and the place.

    Args:
        subtests: The fixture of pytest.
        cases: Name, function that damages the folder, settings of the source and words of the
            message, as in `check_folder_is_refused`.
        write: Function that writes the folder of a case, given a path that does not exist yet.
        read: Function that reads a folder with settings.
    """
    for name, change, keys, words in cases:
        with subtests.test(name=name), TemporaryDirectory() as place:
            folder = write(Path(place) / "folder")
            change(folder)
            check_folder_is_refused(folder, words, lambda: read(folder, **keys))  # noqa: B023


def check_table(subtests: pytest.Subtests, path: Path) -> None:
    """Check that each mistake of a table raises one line with the words of its entry.

    The file is a mapping of `import` (names of objects, such as `hfl: hetero_fl` or
    `images: tests.support.python_federations:images`), `names` (expressions that entries may use,
    in order) and `mistakes`, a list of entries:

    - `python`: an expression, or
    - `command`: the words after `hetero-fl` on the command line, which prints one line, writes
      no file and ends with `status` (default: 2; with 1, the line begins with `failed`), or
    - `config`: changes of a small federation, with dots in keys, `set`: a list of overrides, and
      `dataset`: an expression for the data set;
    - `file`: name of a file that is written first, with the content `text`. Commands and entries
      with a file run in a new folder;
    - `says`: words that the message contains, a text or a list, by default none;
    - `lacks`: words that the message does not contain;
    - `raises`: name of the exception, by default that of the table.

    It may also have `raises`, the exception of all entries (default: `UserError`), `requires`, a
    module without which the table is skipped, `accepted`, a list of entries that raise nothing, and
    `notes`, a list of entries whose words are those of the notes of the prepared run.

    Args:
        subtests: The fixture of pytest.
        path: The file.
    """
    table = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "requires" in table:
        pytest.importorskip(table["requires"])
    kind = table.get("raises", "UserError")
    names = {name: resolve_name(place) for name, place in table.get("import", {}).items()}
    for name, expression in table.get("names", {}).items():
        names[name] = eval(expression, names)
    for entry in table.get("mistakes", ()):
        with subtests.test(mistake=str(entry.get("python") or entry)), _folder(entry):
            if "command" in entry:
                _check_command(entry)
                continue
            with pytest.raises(Exception) as caught:
                _make(entry, names)
            message = str(caught.value)
            assert type(caught.value).__name__ == entry.get("raises", kind), message
            assert "\n" not in message
            _check_words(entry, message)
    for entry in table.get("accepted", ()):
        with subtests.test(accepted=str(entry)), _folder(entry):
            _make(entry, names)
    for entry in table.get("notes", ()):
        with subtests.test(notes=str(entry)):
            _check_words(entry, "\n".join(_prepared(entry, names).notes))


@contextmanager
def _folder(entry: Mapping[str, Any]) -> Iterator[None]:
    """Change to a new folder with the file of an entry, if it needs one."""
    if not entry.keys() & {"command", "file"}:
        yield
        return
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if "file" in entry:
            Path(entry["file"]).write_text(entry["text"], encoding="utf-8")
        yield


def _check_command(entry: Mapping[str, Any]) -> None:
    before = sorted(Path().rglob("*"))
    expected = entry.get("status", 2)
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as error:
        status = main(shlex.split(entry["command"]))
    shown = error.getvalue()
    assert (status, output.getvalue()) == (expected, ""), shown
    assert shown.startswith("error: " if expected == 2 else "failed: ")
    assert shown.count("\n") == 1 and shown.endswith("\n"), shown
    assert sorted(Path().rglob("*")) == before
    _check_words(entry, shown)


def _check_words(entry: Mapping[str, Any], text: str) -> None:
    assert [words for words in _texts(entry, "says") if words not in text] == [], text
    assert [words for words in _texts(entry, "lacks") if words in text] == [], text


def _texts(entry: Mapping[str, Any], key: str) -> list[str]:
    texts = entry.get(key, [])
    return [texts] if isinstance(texts, str) else texts


def _make(entry: Mapping[str, Any], names: dict[str, Any]) -> None:
    if "python" in entry:
        eval(entry["python"], names)
    else:
        _prepared(entry, names)


def _prepared(entry: Mapping[str, Any], names: dict[str, Any]) -> PreparedRun:
    changes = {key.replace(".", "__"): value for key, value in entry.get("config", {}).items()}
    dataset = eval(entry.get("dataset", "None"), names)
    return prepare(config(**changes), entry.get("set", ()), dataset=dataset)
