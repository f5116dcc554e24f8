"""Formatting of values in reports."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.reporting.rendering import format_training, join_values, render


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("cpu", "cpu"),
        (["2 threads", "one core"], "2 threads; one core"),
        (
            {"executor": "serial", "reasons": ["2 threads", "one core"]},
            "executor serial, reasons 2 threads; one core",
        ),
    ],
)
def test_environment_values_are_formatted_in_one_line(value: Any, line: str) -> None:
    assert join_values(value) == line


def test_training_settings_include_logit_adjustment() -> None:
    settings = {"optimizer": {"lr": 0.1, "momentum": None}, "epochs": 2}

    assert format_training(settings) == "lr 0.1, epochs 2"
    assert format_training({**settings, "logit_adjustment": False}) == "lr 0.1, epochs 2"
    adjusted = format_training({**settings, "logit_adjustment": True, "class_weights": "inverse"})
    assert adjusted == "lr 0.1, epochs 2, logit adjustment, class weights"
    options = {"recalibrate": ["global_test", "local_test"], "fine_tune_epochs": 3}
    assert format_training({**settings, **options}) == (
        "lr 0.1, epochs 2, recalibrate global test + local test, fine tune epochs 3"
    )


@pytest.mark.parametrize("attack", ["membership", "inversion"])
def test_audit_page_names_only_the_attacks_made(attack: str) -> None:
    tables: dict[str, list[list[str]]] = {"membership": [], "inversion": []}
    tables[attack] = [["site_1", "loss", "", "", "", ""]]
    page = render(
        "audit.html",
        title="Audit",
        subtitle="",
        privacy=None,
        whose="",
        shadows=0,
        notes=[],
        time="1 s",
        picture={"data": "", "width": 1},
        **tables,
    )

    assert ("which rows they were trained on" in page) == (attack == "membership")
    assert ("can be reconstructed from a client" in page) == (attack == "inversion")
