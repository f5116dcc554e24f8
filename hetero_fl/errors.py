"""The three ways a run ends early, the phrase that helps with a misspelt name, and whose code a file is."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

PACKAGE = Path(__file__).parent
MOST_CHARACTERS = 400  # of a line that quotes what another participant sent
LOOKED = 1000  # so many files of a folder at most are compared with the name of one that is not there
_OTHERS = (  # this project, Python and what was installed
    *(os.path.join(folder, "") for folder in (PACKAGE, PACKAGE.parent / "model_zoo")),
    *(os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<string>",
    "<frozen",
)


class UserError(Exception):
    """A mistake by the user (configuration, file, data, flag): one line that says where, what, and the nearest valid choice.

    The command line prints it and ends with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class RunFailed(Exception):
    """The run itself failed (every upload non-finite, say). The command line prints one line and ends with status 1."""


class GivenUp(RunFailed):
    """A round's protocol ended without a result: fewer took part to its end than it needs. Nothing of the round was learnt."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after which what lies in `path` can be gone on with."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def printable(text: str) -> str:
    """Return the text with control characters, lone surrogates and invisible characters escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: object, most: int = MOST_CHARACTERS) -> str:
    """Return text that another participant may have written as one short printable line.

    Whitespace is collapsed. Control characters, lone surrogates and invisible characters are escaped, so that the line can be
    encoded as UTF-8 and cannot move a terminal's cursor. What is longer than `most` characters is cut and ends with an ellipsis.

    Args:
        text: Anything; its `str` is used.
        most: Length of the result, at most.

    Example:
        >>> one_line("a\\n\\x1b[2Jb")
        'a \\\\x1b[2Jb'
    """
    words = " ".join(str(text)[: 8 * most].split())
    line = printable(words)
    return line if len(line) <= most else line[: most - 1] + "…"


def similar(found: object, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` if one of the choices is close to what was found, else nothing.

    Neither case nor `-` and `_` count: KT-pFL is kt_pfl. Of what is close, the same letters in another order come first.
    """
    names = {_plain(name): name for name in sorted(map(str, choices), reverse=True)}
    word = _plain(str(found))
    close = get_close_matches(word, names, n=3, cutoff=0.6)
    swapped = [name for name in close if sorted(name) == sorted(word)]
    return f"; did you mean '{names[(swapped or close)[0]]}'?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def nearest(found: object, choices: Iterable[str], all_of: str = "") -> str:
    """`; did you mean 'x'?` if one of the choices is close to what was found, else the choices themselves.

    `all_of`: what lists all of them, for where they are more than a line holds.
    """
    names = sorted(map(str, choices))
    if hint := similar(found, names):
        return hint
    more = f", … ({all_of} has all)" if all_of else ", …"
    shown = ", ".join(names[:20]) + (more if len(names) > 20 else "")
    return f"; choose from {shown}" if names else ""


def beside(path: Path) -> str:
    """`; did you mean 'x'?` if what is beside a file that is not there has nearly its name, else nothing."""
    try:
        return similar(path.name, [p.name for p in islice(path.parent.iterdir(), LOOKED)])
    except OSError:
        return ""


def is_users(file: str) -> bool:
    """Whether a source file is the user's own: a method, a model, an objective."""
    return not file.startswith(_OTHERS)
