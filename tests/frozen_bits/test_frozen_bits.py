"""The comparison covers every method and names the first place that differs."""

from __future__ import annotations

from hetero_fl.algorithms import register_algorithm
from tests.frozen_bits.__main__ import compare
from tests.frozen_bits.cases import METHODS


def test_cases_cover_every_method() -> None:
    registered = {
        n for n in register_algorithm if register_algorithm[n].__module__.startswith("hetero_fl.")
    }

    assert set(METHODS) == registered


def test_compare_reports_nothing_for_equal_outcomes() -> None:
    outcomes = {"case": {"models/site_1/weight": "aa", "metrics.jsonl/1/round": "1"}}

    assert compare(outcomes, outcomes) == []


def test_compare_names_the_first_difference() -> None:
    before = {"case": {"models/site_1/weight": "aa", "metrics.jsonl/1/round": "1"}}
    after = {"case": {"models/site_1/weight": "aa", "metrics.jsonl/1/round": "2"}}

    assert compare(before, after) == ["case: metrics.jsonl/1/round: 1 became 2"]


def test_compare_reports_a_missing_value() -> None:
    before = {"case": {"models/site_1/weight": "aa", "summary.json/seed": "0"}}
    after = {"case": {"models/site_1/weight": "aa"}}

    assert compare(before, after) == ["case: summary.json/seed: 0 became None"]


def test_compare_reports_an_error_on_either_side() -> None:
    assert compare({"case": {"error": "boom"}}, {"case": {"error": "boom"}}) == ["case: boom"]
