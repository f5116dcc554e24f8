"""Reports state at the top which protections were used and which clients were malicious."""

from __future__ import annotations

from typing import Any

from hetero_fl.experiment import prepare
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.report import report_facts
from hetero_fl.reporting.summary import collect_protections, describe_attack, describe_protections
from tests.support.federations import config

SPENT = {"epsilon": 3.456, "delta": 1e-5}


def details(method: str = "hybrid", **changes: Any) -> dict[str, Any]:
    return {
        "protections": collect_protections(
            prepare(config(method, "cnn_gn_small", 5, **changes)).federation
        )
    }


def test_privacy_subject_is_stated() -> None:
    assert describe_protections({"privacy": None}, {}) == ["No differential privacy was used."]
    for unit, expected in {
        "record": "of each training row",
        "client": "of each client",
        "local": "with noise added by the client",
    }.items():
        (line,) = describe_protections({"privacy": {**SPENT, "unit": unit}}, details())
        assert line.startswith("Differential privacy of each") and expected in line
        assert line.endswith(": ε = 3.46 at δ = 1e-05.")
    # a run of an older version
    assert describe_protections({"privacy": SPENT}, {}) == [
        "Differential privacy: ε = 3.46 at δ = 1e-05."
    ]


def test_channel_and_rules_are_stated() -> None:
    channel = {
        "compress": [{"topk": 0.05}, {"quantize": 8}],
        "compress_down": ["half"],
    }
    rules = {"predictions": "agreement", "rule": "median"}
    lines = describe_protections({"privacy": None}, details(channel=channel, aggregation=rules))[1:]
    assert lines == [
        "Parameters by median, predictions by agreement: robust against a few malicious clients.",
        "Compression of messages from clients: topk 0.05, quantize 8.",
        "Compression of messages from the server: half.",
    ]
    assert (
        "sums of uploads only"
        in describe_protections({"privacy": None}, details(channel={"secure_sum": {}}))[1]
    )


def test_malicious_clients_are_named() -> None:
    attacks = {"name": "backdoor", "malicious": ["site_2"], "success": 0.25}
    assert describe_attack(None) == ""
    assert describe_attack(attacks) == (
        "1 client sent malicious uploads (backdoor): site_2; the backdoor "
        "worked on 25.0% of the test rows of other classes. "
        "All scores exclude these clients."
    )
    assert describe_attack(
        {"name": "sign_flip", "malicious": list("abcdefgh"), "success": None}
    ).startswith("8 clients sent malicious uploads (sign_flip): a, b, c, d, e, f and 2 more.")
    scores = {"accuracy": 0.5, "balanced_accuracy": 0.5}
    read = [
        {"id": f"site_{i}", "model": "mlp", "n_train": 9, "personal": scores, "global": None}
        for i in (1, 3)
    ]
    for population, drawn in ((3, False), (4, True)):
        summary = {
            "clients": read,
            "attacks": attacks,
            "algorithm": "fedavg",
            "rounds_completed": 1,
            "privacy": None,
            "communication": {"up_bytes": 1, "down_bytes": 1},
            "global": None,
            "personal": {"last": scores},
            "server": None,
            "data": {"name": "digits", "n_train": 18, "n_test": 0},
        }
        found = {
            "population": population,
            "proxy": 0,
            "about": "",
            "kind": "multiclass",
            "labels": list("abcdefghij"),
            "rows": {client["id"]: {"test": 5} for client in read},
        }
        story = render("report_story.html", **report_facts(summary, found))
        assert "site_2" in story and ("fixed random sample" in story) == drawn
