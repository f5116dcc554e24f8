"""Exceptions, suggestions for misspelled names, and printable text for messages."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Maximum length of a line that quotes untrusted text.
MAX_LINE_CHARACTERS = 400
# Characters that join letters or emoji and have no width.
JOINERS = "\u200c\u200d"
# Minimum ratio of similar names (see `difflib.SequenceMatcher`), so that `noniid` is not `iid`.
MIN_SIMILARITY = 0.7
# Maximum number of files in a folder with which a missing file is compared.
MAX_COMPARED_FILES = 1000
# Prefixes of the source files of this project.
_OWN_PREFIXES = tuple(
    os.path.join(folder, "") for folder in (PACKAGE, PACKAGE.parent / "model_zoo")
)
# Prefixes of source files outside the user's code: this project, Python and installed packages.
_LIBRARY_PREFIXES = (
    *_OWN_PREFIXES,
    *(
        os.path.join(sysconfig.get_path(name), "")
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
    ),
    "<string>",
    "<frozen",
)


class UserError(ValueError):
    """Raised for an invalid configuration, file, data set or option.

    The message is one line that names the place, the value found and what is valid. The command
    line prints the message and exits with status 2.

    Args:
        message: The message, in which whitespace is collapsed and control characters are escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(" ".join(str(message).split())))


class ArgumentError(UserError):
    """Raised for an invalid argument of a function that is also a command.

    The message starts with the name of the argument. The command line prints the option instead.
    """


class RunFailedError(Exception):
    """Raised when a run fails, for example because all uploads are non-finite.

    The command line prints the message and exits with status 1.
    """


class NoUploadError(Exception):
    """Raised when a client cannot upload. The message states the reason."""


class RoundAbandonedError(RunFailedError):
    """Raised when too few clients remain to complete the secure aggregation of a round."""


class Interrupted(KeyboardInterrupt):
    """Raised after SIGINT or SIGTERM when the run can be resumed.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def is_printable(text: str) -> bool:
    """Return whether a text has no control characters, lone surrogates or invisible characters.

    Unlike `str.isprintable`, this accepts spaces of any width and joiners of letters and emoji.
    """
    return all(c.isprintable() or c in JOINERS or unicodedata.category(c) == "Zs" for c in text)


def printable(text: str) -> str:
    """Return the text with control characters, lone surrogates and invisible characters escaped."""
    if text.isprintable():
        return text
    return "".join(c if is_printable(c) else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return a text of several lines with each line escaped (see `printable`)."""
    return "\n".join(map(printable, text.expandtabs().split("\n")))


def echo(text: object = "", *, err: bool = False, end: str = "\n") -> None:
    """Print a text with control characters escaped, so that names cannot control the terminal.

    Args:
        text: The text, whose line breaks are kept.
        err: Whether to print to stderr instead of stdout.
        end: Text that is printed last.
    """
    print(printable_lines(str(text)), end=end, file=sys.stderr if err else sys.stdout, flush=True)


def one_line(text: object, max_length: int = MAX_LINE_CHARACTERS) -> str:
    r"""Return untrusted text as one short printable line.

    Whitespace is collapsed. Control characters, lone surrogates and invisible characters are
    escaped, so the line can be encoded as UTF-8 and cannot control a terminal. A longer text is
    truncated and ends with an ellipsis.

    Args:
        text: Any object, which is converted with `str`.
        max_length: Maximum number of characters of the result.

    Example:
        >>> from hetero_fl.utils.errors import one_line
        >>> one_line("a\n\x1b[2Jb")
        'a \\x1b[2Jb'
    """
    try:
        string = str(text)
    except (ValueError, RecursionError):
        # An integer of more than 4,300 digits, or deeply nested lists.
        string = f"({type(text).__name__} too large to show)"
    # Escaping lengthens the text, so more characters than necessary need not be processed.
    line = printable(" ".join(string[: 8 * max_length].split()))
    return line if len(line) <= max_length else line[: max_length - 1] + "…"


def closest(found: object, choices: Iterable[str]) -> str | None:
    """Return the choice that is most similar to a name, or None if no choice is similar.

    The comparison ignores case, hyphens, underscores and periods.

    Args:
        found: The name.
        choices: Valid names.

    Example:
        >>> from hetero_fl.utils.errors import closest
        >>> closest("KT-pFL", ["fedmd", "kt_pfl"]), closest("fedmdd", ["fedmd", "kt_pfl"])
        ('kt_pfl', 'fedmd')
    """
    names = {_normalize(name): name for name in sorted(map(str, choices), reverse=True)}
    matches = get_close_matches(_normalize(str(found)), names, n=1, cutoff=MIN_SIMILARITY)
    return names[matches[0]] if matches else None


def suggest_similar(found: object, choices: Iterable[str]) -> str:
    """Return the text `; did you mean 'x'?` for the choice that is closest to a name.

    The text is empty if no choice is similar (see `closest`).
    """
    match = closest(found, choices)
    return "" if match is None else f"; did you mean '{match}'?"


def _normalize(name: str) -> str:
    return re.sub("[-_.]", "", name.lower())


def suggest_or_list(found: object, choices: Iterable[str], all_of: str = "") -> str:
    """Return a suggestion if a choice is similar to a name, otherwise the list of choices.

    Args:
        found: The name that was found.
        choices: Valid names.
        all_of: Command or function that lists all choices. The text mentions `all_of` if there are
            more than 20 choices.

    Returns:
        The text `; did you mean 'x'?` or `; choose from x, y, z`. Without choices, an empty string.
    """
    names = sorted(map(str, choices))
    if hint := suggest_similar(found, names):
        return hint
    more = f", … (see {all_of})" if all_of else ", …"
    shown = ", ".join(names[:20]) + (more if len(names) > 20 else "")
    return f"; choose from {shown}" if names else ""


def describe_removed(name: object, replacements: Mapping[str, str]) -> str:
    """Return the message that a name of an earlier version was removed.

    Args:
        name: The name that was found. The part before a colon is looked up.
        replacements: What to use instead, keyed by former name.

    Returns:
        The message, or an empty string if the name is not a former name.

    Example:
        >>> from hetero_fl.utils.errors import describe_removed
        >>> describe_removed("bulyan", {"bulyan": "multi_krum"})
        'bulyan was removed; use multi_krum'
    """
    former = name.partition(":")[0] if isinstance(name, str) else ""
    return f"{name} was removed; use {replacements[former]}" if former in replacements else ""


def check_names(
    found: Iterable[object], known: Iterable[object], problem: str, detail: str = ""
) -> None:
    """Check that all names are known.

    Args:
        found: Names to check.
        known: All valid names.
        problem: Text of the message before the name.
        detail: Text of the message between the name and the suggestion.

    Raises:
        UserError: If a name is not known.

    Example:
        >>> from hetero_fl.utils.errors import check_names
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
    """Return the text `; did you mean 'x'?` if a missing file has a sibling of a similar name.

    Names are compared without their suffixes.

    Args:
        path: The missing file.
        suffixes: Suffixes of the files to consider. If empty, all files are considered.

    Returns:
        The suggestion, or an empty string.
    """
    try:
        siblings = [
            sibling
            for sibling in islice(path.parent.iterdir(), MAX_COMPARED_FILES)
            if not suffixes or sibling.suffix in suffixes
        ]
    except OSError:
        return ""
    stem = closest(path.stem, {sibling.stem for sibling in siblings})
    match = min((sibling.name for sibling in siblings if sibling.stem == stem), default=None)
    return "" if match is None else f"; did you mean '{match}'?"


def is_own_file(file: str) -> bool:
    """Return whether a source file belongs to this project."""
    return file.startswith(_OWN_PREFIXES)


def user_code_place(error: BaseException) -> str | None:
    """Return the innermost line that an exception passed through outside hetero_fl and libraries.

    A SystemExit that a library raises has no such line: a signal handler, such as Flower's, may
    raise it while the user's code runs.

    Returns:
        A text such as `my_method.py:12, in train`, or None if there is no such line.
    """
    codes = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SystemExit):
        # Packages such as wandb replace `sys.exit` with a function of their own.
        replacement = getattr(sys.exit, "__code__", None)
        codes = [(code, line) for code, line in codes if code is not replacement][-1:]
    for code, line in reversed(codes):
        if not code.co_filename.startswith(_LIBRARY_PREFIXES):
            return f"{code.co_filename}:{line}, in {code.co_name}"
    return None


@contextmanager
def translate_exits() -> Iterator[None]:
    """Convert a SystemExit that the user's code raises to RunFailedError.

    The message is one line with the file, the line number and the function. A SystemExit of this
    project or of a library is raised unchanged.
    """
    try:
        yield
    except SystemExit as error:
        place = user_code_place(error)
        if place is None:
            raise
        raise RunFailedError(f"{place}: SystemExit: {one_line(error)}") from error
