"""Formatting of values in reports."""

from __future__ import annotations

from typing import Any

from hetero_fl.reporting.rendering import format_environment, format_training, render
from tests.support.cases import each_case


def test_environment_rows_have_labels_instead_of_keys() -> None:
    environment = {
        "run_directory_version": 1,
        "run": "e1b25231376e8167",
        "hetero_fl": "0.1.0",
        "cpu": "a processor",
        "cores": 2,
        "threads": 1,
        "device": "cpu",
        "choice": {
            "executor": "serial",
            "device": "cpu",
            "threads": 1,
            "server_threads": 1,
            "chunk": 1,
            "precision": "float32",
            "deterministic": False,
            "workers": 1,
            "reasons": [
                "serial executor: too short to benefit from worker processes",
                "1 thread for clients, 1 for the server: training steps are too small",
            ],
        },
        "packages": {"torch": "2.5.1", "numpy": "2.0.0"},
    }

    assert format_environment(environment) == {
        "Executor": "serial",
        "Threads": "1 for clients, 1 for the server",
        "Reasons": "serial executor: too short to benefit from worker processes; "
        "1 thread for clients, 1 for the server: training steps are too small",
        "Device, precision": "CPU, float32",
        "Processor": "a processor, 2 cores",
        "Run id": "e1b25231376e8167",
        "Run directory format": "1",
        "Packages": "torch 2.5.1, numpy 2.0.0",
        "hetero_fl": "0.1.0",
    }


def test_environment_rows_name_workers_and_clients_at_a_time() -> None:
    choice = {"executor": "processes", "workers": 4, "chunk": 12, "deterministic": True}

    rows = format_environment({"device": "cuda:0 (a GPU)", "choice": choice})

    assert rows == {
        "Executor": "processes, 4 workers, 12 clients at a time",
        "Device, precision": "cuda:0 (a GPU), deterministic algorithms",
    }


@each_case(
    ("settings", "kind", "text"),
    [
        ({}, "multiclass", ""),
        ({"logit_adjustment": False}, "multiclass", ""),
        (
            {"logit_adjustment": True, "class_weights": "inverse"},
            "multiclass",
            ", logit adjustment, class weights",
        ),
        (
            {"recalibrate": ["global_test", "local_test"], "fine_tune_epochs": 3},
            "multiclass",
            ", recalibrated BatchNorm statistics (global test, local test), fine-tuning epochs 3",
        ),
        (
            {
                "logit_adjustment": True,
                "class_weights": "inverse",
                "prior_correction": True,
                "local_prior": True,
                "fine_tune_epochs": 3,
            },
            "regression",
            ", fine-tuning epochs 3",
        ),
    ],
)
def test_training_settings_that_have_an_effect_are_shown(
    settings: dict[str, Any], kind: str, text: str
) -> None:
    common = {"optimizer": {"lr": 0.1, "momentum": None}, "epochs": 2}

    assert format_training({**common, **settings}, kind) == f"lr 0.1, epochs 2{text}"


@each_case("attack", ["membership inference", "gradient inversion"])
def test_audit_page_names_only_the_attacks_made(attack: str) -> None:
    page = render(
        "audit.html",
        title="Audit",
        subtitle="",
        privacy=None,
        whose="",
        shadows=0,
        notes=[],
        time="1 s",
        pictures=[],
        tables={attack: [("client", "attack"), ("site_1", "loss")]},
    )

    assert ("which rows they were trained on" in page) == (attack == "membership inference")
    assert ("can be reconstructed from a client" in page) == (attack == "gradient inversion")
    assert ">Client</th>" in page
