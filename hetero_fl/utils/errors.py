"""The three ways a run ends early, the phrase that helps with a misspelt name, and whose code a file is."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
MOST_CHARACTERS = 400  # of a line that quotes what another participant sent
SHORTEST = 3  # letters of an abbreviation
# so many files of a folder at most are compared with the name of one that is not there
LOOKED = 1000
_OTHERS = (  # this project, Python and what was installed
    *(os.path.join(folder, "") for folder in (PACKAGE, PACKAGE.parent / "model_zoo")),
    *(
        os.path.join(sysconfig.get_path(name), "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ),
    "<string>",
    "<frozen",
)


class UserError(Exception):
    """A mistake by the user (configuration, file, data, flag): one line that says where, what, and the nearest valid choice.

    The command line prints it and ends with status 2.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


class RunFailedError(Exception):
    """The run itself failed (every upload non-finite, say). The command line prints one line and ends with status 1."""


class NoUploadError(Exception):
    """A client's upload is missing. The message says why."""


class RoundAbandonedError(RunFailedError):
    """A round's protocol ended without a result: fewer took part to its end than it needs. Nothing of the round was learnt."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after which what lies in `path` can be gone on with."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def printable(text: str) -> str:
    """Return the text with control characters, lone surrogates and invisible characters escaped."""
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    )


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
    try:
        whole = str(text)
    except (ValueError, RecursionError):
        # An integer of more than 4,300 digits, or deeply nested lists.
        whole = f"({type(text).__name__} too large to show)"
    words = " ".join(whole[: 8 * most].split())
    line = printable(words)
    return line if len(line) <= most else line[: most - 1] + "…"


def closest(found: object, choices: Iterable[str]) -> str | None:
    """Return the choice of which `found` is probably a misspelling, or else an abbreviation, if there is one.

    Neither case nor `-` and `_` count: KT-pFL is kt_pfl.
    """
    names = list(choices)
    meant = closest_misspelling(found, names)
    return closest_abbreviation(found, names) if meant is None else meant


def closest_misspelling(found: object, choices: Iterable[str]) -> str | None:
    """Return the choice that is at most one edit in four letters away, the nearest one if there are several.

    An edit is an insertion, a deletion, a substitution or a swap of two neighbors.
    """
    names = {_normalize(name): name for name in sorted(map(str, choices), reverse=True)}
    word = _normalize(str(found))
    if word in names:
        return names[word]
    edits = {
        name: _edit_distance(word, name)
        for name in sorted(names)
        # With such lengths fewer edits are impossible; they need not be counted.
        if abs(len(word) - len(name)) <= _max_edits(word, name)
    }
    near = [name for name, count in edits.items() if count <= _max_edits(word, name)]
    return (
        names[min(near, key=lambda name: (edits[name], sorted(name) != sorted(word)))]
        if near
        else None
    )


def closest_abbreviation(found: object, choices: Iterable[str]) -> str | None:
    """Return the only choice that begins with `found` (`temp`, temperature), ends with it as a word (`decay`, weight_decay), or
    has words added to it in `found` (`dirichlet_split`, dirichlet)."""
    word = _normalize(str(found))
    if len(word) < SHORTEST:
        return None
    names = sorted(set(map(str, choices)))
    last_word = "_" + str(found).lower().replace("-", "_")
    for meant in (
        [name for name in names if _normalize(name).startswith(word)],
        [name for name in names if name.lower().replace("-", "_").endswith(last_word)],
        [name for name in names if len(name) >= SHORTEST and word.startswith(_normalize(name))],
    ):
        if len(meant) == 1:
            return meant[0]
    return None


def _max_edits(a: str, b: str) -> int:
    """How many edits apart two words may be for one to be a misspelling of the other."""
    return max(int(max(len(a), len(b)) > 1), min(len(a), len(b)) // 4)


def _edit_distance(a: str, b: str) -> int:
    """Count the insertions, deletions, substitutions and swaps of neighbors that make one word the other.

    The optimal string alignment distance (Damerau 1964).
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous = row
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], before[j - 2] + 1)
        before = previous
    return row[-1]


def suggest_similar(found: object, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` if `found` is close to one of the choices (see `closest`), else nothing."""
    meant = closest(found, choices)
    return "" if meant is None else f"; did you mean '{meant}'?"


def _normalize(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def suggest_or_list(found: object, choices: Iterable[str], all_of: str = "") -> str:
    """`; did you mean 'x'?` if one of the choices is close to what was found, else the choices themselves.

    `all_of`: what lists all of them, for where they are more than a line holds.
    """
    names = sorted(map(str, choices))
    if hint := suggest_similar(found, names):
        return hint
    more = f", … ({all_of} has all)" if all_of else ", …"
    shown = ", ".join(names[:20]) + (more if len(names) > 20 else "")
    return f"; choose from {shown}" if names else ""


def check_names(
    found: Iterable[object], known: Iterable[object], problem: str, detail: str = ""
) -> None:
    """Raise an error for the first name that is not known, with the nearest name that is.

    Args:
        found: Names to check.
        known: All valid names.
        problem: Begins the message; the name follows.
        detail: Follows the name; a suggestion ends the message.

    Raises:
        UserError: If a name is not known.

    Example:
        >>> check_names(["dirichlet"], ["iid", "dirichlet"], "data.partition.kind: found")
        >>> check_names(["site"], ["age", "sex"], "data.csv has no column")
        Traceback (most recent call last):
        hetero_fl.utils.errors.UserError: data.csv has no column 'site'; choose from age, sex
    """
    valid = [str(name) for name in known]
    for name in map(str, found):
        if name not in valid:
            raise UserError(f"{problem} '{name}'{detail}{suggest_or_list(name, valid)}")


def suggest_file(path: Path, suffixes: Sequence[str] = ()) -> str:
    """Return `; did you mean 'x'?` if a file next to one that does not exist has nearly its name, else nothing.

    Suffixes are not compared: `nope.yaml` is not nearly `compose.yaml`. `suffixes`: of the files that are considered (all).
    """
    try:
        there = [
            p for p in islice(path.parent.iterdir(), LOOKED) if not suffixes or p.suffix in suffixes
        ]
    except OSError:
        return ""
    stem = closest(path.stem, {p.stem for p in there})
    if stem is None:
        return ""
    meant = min(
        (p for p in there if p.stem == stem),
        key=lambda p: (_edit_distance(path.suffix, p.suffix), p.name),
    )
    return f"; did you mean '{meant.name}'?"


def is_user_code(file: str) -> bool:
    """Whether a source file is the user's own: a method, a model, an objective."""
    return not file.startswith(_OTHERS)
