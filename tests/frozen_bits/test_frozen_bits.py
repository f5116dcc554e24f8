"""The comparison covers every method and names the first place that differs."""

from __future__ import annotations

from hetero_fl.algorithms import register_algorithm
from tests.frozen_bits.__main__ import Outcomes, compare
from tests.frozen_bits.cases import METHODS


def test_cases_cover_every_method() -> None:
    registered = {
        n for n in register_algorithm if register_algorithm[n].__module__.startswith("hetero_fl.")
    }

    assert set(METHODS) == registered


def test_compare_names_the_first_difference() -> None:
    same = {"models/site_1/weight": "aa", "metrics.jsonl/1/round": "1"}
    before = {"same": same, "other": same, "less": same, "failing": same}
    after: Outcomes = {
        "same": same,
        "other": {**same, "metrics.jsonl/1/round": "2"},
        "less": {"metrics.jsonl/1/round": "1"},
        "failing": {"error": "boom"},
    }

    assert compare(before, after) == [
        "other: metrics.jsonl/1/round: 1 became 2",
        "less: models/site_1/weight: aa became None",
        "failing: boom",
    ]
    assert compare({"case": {"error": "boom"}}, {"case": same}) == ["case: boom"]
