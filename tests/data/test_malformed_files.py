"""Malformed files give one line or a correct result, in little memory and time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.malformed_files import READERS, check_case, record_events

pytest.importorskip("datasets", reason="pip install 'hetero_fl[datasets]'")
pytest.importorskip("pyarrow", reason="pip install 'hetero_fl[tables]'")
TENTH = range(0, 500, 10)
OTHERS = sorted({*range(500)} - {*TENTH})


@pytest.mark.parametrize("numbers", [TENTH, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_malformed_files_give_one_line_or_a_result(numbers: list[int], tmp_path: Path) -> None:
    for index, reader in enumerate(READERS):
        # Imports of packages count neither as memory nor as time of a case.
        (tmp_path / f"valid{index}").mkdir()
        reader.write(tmp_path / f"valid{index}")
        reader.read(tmp_path / f"valid{index}")
    record_events()
    outcomes = {}
    for number in numbers:
        (tmp_path / str(number)).mkdir()
        outcome, title = check_case(number, tmp_path / str(number))
        outcomes[title] = outcome

    assert {t: o for t, o in outcomes.items() if o not in ("read", "refused")} == {}
    assert list(outcomes.values()).count("refused") > len(numbers) / 3
