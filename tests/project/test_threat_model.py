"""The threat model names an existing test for everything that a party cannot do."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.cases import each_case

ROOT = Path(__file__).parents[2]
PARTIES = ("the server", "a site", "other sites", "the network", "the author of a file")
TABLE = re.compile(r"^(\|.*\| test \|)\n\|[ |-]+\|\n((?:\|.*\n)+)", re.MULTILINE)


@each_case("page", ["SECURITY.md", "docs/explanation/threat_model.md"])
def test_everything_that_a_party_cannot_do_names_an_existing_test(page: str) -> None:
    tables = TABLE.findall((ROOT / page).read_text(encoding="utf-8"))

    assert all(any(f"| {party} " in header + rows for header, rows in tables) for party in PARTIES)
    for row in "".join(rows for _, rows in tables).splitlines():
        named = re.fullmatch(r"\|.+ \| `(tests/[\w/]+\.py)::(test_\w+)` \|", row)
        assert named, row
        assert f"\ndef {named[2]}(" in (ROOT / named[1]).read_text(encoding="utf-8"), row
