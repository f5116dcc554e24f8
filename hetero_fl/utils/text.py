"""Functions for text: words, splitting outside brackets, lists of names, plurals, and notes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

OPENING = "[{("
CLOSING = "]})"


def split_top_level(text: str, separator: str) -> list[str]:
    """Split a text at each occurrence of a separator outside brackets.

    The separator is a single character.

    Example:
        >>> from hetero_fl.utils.text import split_top_level
        >>> split_top_level("a,b=[1,2]", ",")
        ['a', 'b=[1,2]']
    """
    parts = []
    start = 0
    depth = 0
    for index, character in enumerate(text):
        if character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth = max(0, depth - 1)
        elif character == separator and not depth:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return parts


def format_list(names: Iterable[str], max_names: int = 8, quote: bool = False) -> str:
    """Join names with commas and count the names beyond a maximum.

    Args:
        names: The names.
        max_names: Maximum number of names to list.
        quote: Whether to put names in single quotes.

    Example:
        >>> from hetero_fl.utils.text import format_list
        >>> format_list(["a", "b", "c"], max_names=2)
        'a, b and 1 more'
    """
    listed = [f"'{name}'" if quote else name for name in names]
    more = f" and {len(listed) - max_names:,} more" if len(listed) > max_names else ""
    return ", ".join(listed[:max_names]) + more


def pluralize(count: int, noun: str) -> str:
    """Return a count followed by a noun, such as `1 round` or `2,000 rows`.

    The plural is formed by adding `s`.
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


class Caution(str):
    """A note on a run that says that results may be wrong.

    Other notes are plain strings. A caution is logged at level WARNING, so that Python and the
    command line show it by default.

    Example:
        >>> from hetero_fl.utils.text import Caution, prefix_note
        >>> prefix_note("clients: 'a'", Caution("no test rows"))
        Caution("clients: 'a': no test rows")
    """

    def __repr__(self) -> str:
        return f"Caution({super().__repr__()})"


def prefix_note(where: str, note: str) -> str:
    """Return a note that starts with a place, and that is a caution if `note` is one."""
    return type(note)(f"{where}: {note}")


UNSPACED = (
    r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e80-\u0ecf\u0edc-\u0edf\u1000-\u103f\u1050-\u108f"
    r"\u109a-\u109f\u1780-\u17d3\u17d7\u17dc\u17dd\u2e80-\u2fdf\u3005-\u3007\u3021-\u302d"
    r"\u3031-\u3035\u303b\u3041-\u309f\u30a1-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9fe\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f"
    r"\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese, whose words are not separated by spaces."""


@cache
def _word_pattern() -> re.Pattern[str]:
    """Return the pattern of a word: letters and digits, each with its combining marks."""
    # Vowels, accents and tones. Words of Persian and Indic languages also contain joiners.
    codes = range(0x300, 0x20000)
    marks = {code for code in codes if unicodedata.category(chr(code)) in ("Mn", "Mc")}
    # Ranges, as a set of single characters is slow.
    starts = sorted(code for code in marks if code - 1 not in marks)
    ends = sorted(code for code in marks if code + 1 not in marks)
    ranges = [f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True)]
    mark = f"[{''.join(ranges)}\u200c\u200d]"
    letter = rf"[^\W{UNSPACED}]"
    return re.compile(f"[{UNSPACED}]{mark}*|{letter}+(?:['’-]{letter}+|{mark}+{letter}*)*|[.!?]")


def split_words(text: str) -> list[str]:
    """Split a text into lowercase words, and into characters where no spaces separate words.

    Periods, question marks and exclamation marks are separate words. Other punctuation is dropped,
    except apostrophes and hyphens within a word. Combining marks, such as the vowel signs of Hindi,
    belong to their word. In scripts without spaces between words, such as Chinese, Japanese and
    Thai, each character is a word, together with its combining marks.

    Example:
        >>> from hetero_fl.utils.text import split_words
        >>> split_words("I love 北京!")
        ['i', 'love', '北', '京', '!']
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text.lower()))


def note_unspaced(texts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return a remark if texts, as sequences of words, have scripts without spaces."""
    script = re.compile(f"[{UNSPACED}]")
    if not any(script.match(word) for words in texts for word in words):
        return ()
    return (
        "characters are the tokens of text in scripts without spaces between words; text.length "
        "counts them",
    )
