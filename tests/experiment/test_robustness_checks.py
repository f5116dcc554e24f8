"""Shares of malicious clients, rules and attacks of users, notes, and results of attacked runs."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.robustness.attacks import Attack
from hetero_fl.robustness.rules import PredictionRule, Rule
from hetero_fl.utils.errors import UserError
from tests.support.federations import config, rounds_of

MLP = {"name": "mlp", "hidden": [8]}
THIS_MODULE = f"python:{__name__}"


def small(method: str = "fedavg", **changes: Any) -> dict[str, Any]:
    data = {"partition": {"kind": "iid", "min_size": 5}, "train_limit": 250, "test_limit": 20}
    return config(method, MLP, 7, **{f"data__{k}": v for k, v in data.items()}, **changes)


def test_share_of_malicious_clients_is_rounded_up() -> None:
    counted = load_config(small(aggregation={"malicious": 3})).aggregation
    share = load_config(small(aggregation={"malicious": 0.2})).aggregation

    assert counted.num_malicious(9) == 3
    assert [share.num_malicious(n) for n in (1, 5, 6, 15, 20)] == [1, 1, 2, 3, 4]


class Largest(Rule):
    """Custom rule for parameters."""

    def combine(self, block, num_malicious):
        return {name: block.stack(name).amax(0) for name in block.names}


class Quiet(PredictionRule):
    """Custom rule for predictions."""

    def combine(self, predictions, num_malicious):
        return 0 * predictions[0]


class Former(PredictionRule):
    """Rule for predictions with the arguments of an earlier version."""

    def combine(self, predictions, num_malicious, clients, memory):
        return predictions[0]


class Zeros(Attack):
    """Custom attack that uploads zero updates."""

    acts_on = frozenset({"updates"})

    def poison_updates(self, true_uploads, context):
        return 0 * true_uploads


def test_custom_rules_and_attacks() -> None:
    source = small(
        "hybrid",
        aggregation={
            "rule": f"{THIS_MODULE}:Largest",
            "predictions": f"{THIS_MODULE}:Quiet",
            "malicious": 1,
        },
        attacks={"name": f"{THIS_MODULE}:Zeros"},
        algorithm__distill_at="client",
        rounds=1,
    )
    rounds = rounds_of(source)
    assert not rounds.server.state["teacher"].softmax(-1).std() > 1e-6
    with pytest.raises(UserError, match=r"is not a subclass of hetero_fl\.robustness\.rules\.Rule"):
        prepare(small(aggregation={"rule": f"{THIS_MODULE}:Zeros"}))
    with pytest.raises(UserError, match=r"Former: expected a method combine\(self, predictions, n"):
        prepare(small("feddf", aggregation={"predictions": f"{THIS_MODULE}:Former"}))
    with pytest.raises(UserError, match=r"attacks\.name: module .* has no 'Zeroes'"):
        prepare(small(attacks={"name": f"{THIS_MODULE}:Zeroes"}))


def test_run_reports_malicious_clients(tmp_path) -> None:
    source = small(
        "hybrid",
        aggregation={"predictions": "agreement", "malicious": 2},
        rounds=2,
        attacks={
            "name": "backdoor",
            "clients": ["site_2", "site_6"],
            "from_round": 2,
            "trigger": 2,
        },
    )
    finished = run(source, out=tmp_path / "run")
    attacks = finished.summary["attacks"]
    assert (
        attacks["name"] == "backdoor"
        and attacks["malicious"] == ["site_2", "site_6"]
        and 0 <= attacks["success"] <= 1
    )
    records = finished.directory.metrics()
    malicious = [r["attacks"]["malicious"] for r in records]
    assert malicious == [[], ["site_2", "site_6"]]
    assert [c["id"] for c in finished.summary["clients"]] == [f"site_{i}" for i in (1, 3, 4, 5, 7)]
    assert (
        "2 of 7 clients are malicious (backdoor, from round 2): site_2, site_6"
        in (tmp_path / "run" / "log.txt").read_text()
    )
