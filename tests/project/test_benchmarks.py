"""Every method has a reference loop for timing."""

from __future__ import annotations

from hetero_fl.algorithms import register_algorithm


def test_every_method_has_a_reference_loop() -> None:
    from benchmarks.speed.every_method import LOOPS
    from tests.references.loops.small_models import LOOPS as HEAVY

    actual = {
        name
        for name in register_algorithm
        if register_algorithm[name].__module__.startswith("hetero_fl.")
        # Example methods may be registered, too.
    }
    assert {*LOOPS, *HEAVY} == actual
