"""Text that messages quote: every letter stays, and nothing controls a terminal."""

from __future__ import annotations

from hetero_fl.utils.errors import is_printable, printable
from tests.support.cases import each_case

FAMILY = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"


@each_case(
    "name",
    [
        "a\N{NO-BREAK SPACE}b",
        "e\N{COMBINING ACUTE ACCENT}",
        "می\N{ZERO WIDTH NON-JOINER}شود",
        FAMILY,
    ],
)
def test_letters_of_all_scripts_and_emoji_are_printed_as_they_are(name: str) -> None:
    assert is_printable(name)
    assert printable(name) == name


@each_case(
    ("name", "escaped"),
    [
        ("a\x1b[2J", "a\\x1b[2J"),
        ("a\nb", "a\\nb"),
        ("\ud800", "\\ud800"),
        ("\u202egnp", "\\u202egnp"),
        ("a\u200b", "a\\u200b"),
        ("a\u2028b", "a\\u2028b"),
    ],
)
def test_control_and_invisible_characters_are_escaped(name: str, escaped: str) -> None:
    assert not is_printable(name)
    assert printable(name) == escaped
