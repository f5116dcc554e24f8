"""Every method has a loop by hand to be timed against."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_fl.algorithms import algorithm


def test_every_method_is_held_against_a_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from bare import LOOPS as HEAVY
    from every_method import LOOPS

    ours = {
        name for name in algorithm if algorithm[name].__module__.startswith("hetero_fl.")
    }  # examples may be there, too
    assert {*LOOPS, *HEAVY} == ours
