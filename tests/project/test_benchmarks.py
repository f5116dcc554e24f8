"""Every method has a loop by hand to be timed against."""

from __future__ import annotations

from hetero_fl.algorithms import register_algorithm


def test_every_method_is_held_against_a_bare_loop() -> None:
    from benchmarks.speed.every_method import LOOPS
    from tests.references.loops.small_models import LOOPS as HEAVY

    ours = {
        name
        for name in register_algorithm
        if register_algorithm[name].__module__.startswith("hetero_fl.")
    }  # examples may be there, too
    assert {*LOOPS, *HEAVY} == ours
