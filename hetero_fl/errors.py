"""The three ways a run ends early, the phrase that helps with a misspelt name, and whose code a file is."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parent
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


def similar(found: object, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` if one of the choices is close to what was found, else nothing."""
    close = get_close_matches(str(found), sorted(map(str, choices)), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def nearest(found: object, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` if one of the choices is close to what was found, else the choices themselves."""
    names = sorted(map(str, choices))
    if hint := similar(found, names):
        return hint
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"; choose from {shown}" if names else ""


def is_users(file: str) -> bool:
    """Whether a source file is the user's own: a method, a model, an objective."""
    return not file.startswith(_OTHERS)
