"""Rules and attacks that cannot work are refused on loading; uncovered uploads are noted."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.config.robustness import ATTACKS
from hetero_fl.experiment import prepare, run
from hetero_fl.experiment.configuration import load_config
from hetero_fl.robustness.attacks import Attack
from hetero_fl.robustness.rules import PredictionRule, Rule
from hetero_fl.utils.errors import UserError
from tests.support.federations import MIXED, config, rounds_of

MLP = {"name": "mlp", "hidden": [8]}


def small(
    method: str = "fedavg", models: Any = MLP, clients: int = 7, **changes: Any
) -> dict[str, Any]:
    source = config(
        method, models, clients, data__partition={"kind": "iid", "min_size": 5}, **changes
    )
    source["data"].update(train_limit=250, test_limit=20)
    return source


def refused(words: str, *source: Any, **changes: Any) -> None:
    with pytest.raises(UserError) as error:
        prepare(small(*source, **changes))
    assert words in str(error.value), str(error.value)


def test_invalid_values_raise_one_line() -> None:
    refused(
        "aggregation.rule: unknown value 'krun'; did you mean 'krum'?", aggregation={"rule": "krun"}
    )
    refused(
        "attacks.name: unknown value 'sign_flop'; did you mean 'sign_flip'?",
        attacks={"name": "sign_flop"},
    )
    refused(
        "attacks.clients: unknown client 'site_77'",
        attacks={"name": "scaled", "clients": ["site_77"]},
    )
    refused("attacks.name: missing", attacks={"share": 0.2})
    for count in (-1, 0.5, 1.5):
        refused(
            "aggregation.malicious: must be an integer >= 0 or a share >= 0 and < 0.5, "
            f"got {count}",
            aggregation={"malicious": count},
        )
    assert load_config(small(aggregation={"malicious": 3})).aggregation.num_malicious(9) == 3
    shares = [
        load_config(small(aggregation={"malicious": 0.2})).aggregation.num_malicious(n)
        for n in (1, 5, 6, 15, 20)
    ]
    assert shares == [1, 1, 2, 3, 4]  # shares are rounded up


@pytest.mark.parametrize(
    ("rule", "num_malicious", "least"),
    [
        ("median", 4, 9),
        ("trimmed_mean", 4, 9),
        ("krum", 3, 9),
        ("multi_krum", 3, 9),
        ("bulyan", 2, 11),
        ("norm_bound", 4, 9),
    ],
)
def test_rule_refuses_too_few_clients(rule: str, num_malicious: int, least: int) -> None:
    words = (
        f"aggregation.rule={rule} tolerates {num_malicious} malicious clients "
        f"(aggregation.malicious={num_malicious}) among {least} or more clients, but 7"
    )
    refused(words, aggregation={"rule": rule, "malicious": num_malicious})
    refused(
        f"set aggregation.malicious to {num_malicious - 1} or less",
        aggregation={"rule": rule, "malicious": num_malicious},
    )
    assert (
        prepare(
            small(aggregation={"rule": rule, "malicious": num_malicious - 1})
        ).config.aggregation.rule
        == rule
    )


def test_rule_counts_clients_per_group_and_cohort() -> None:
    two = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [12]}]
    refused(
        "but 4 upload backbone.1.weight of mlp",
        "fedavg",
        two,
        aggregation={"rule": "krum", "malicious": 1},
    )
    refused("but 4 upload", aggregation={"rule": "krum", "malicious": 1}, clients__per_round=4)
    prepare(small(aggregation={"rule": "krum", "malicious": 1}, clients__per_round=5))
    words = (
        "aggregation.predictions=spectral tolerates 4 malicious clients "
        "(aggregation.malicious=4) among 9 or more clients, but 7 upload logits"
    )
    refused(words, "fedmd", MIXED, aggregation={"predictions": "spectral", "malicious": 4})
    # predictions are aggregated over all architectures
    prepare(small("fedmd", MIXED, aggregation={"predictions": "spectral", "malicious": 3}))


@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("fedmd", "rule"),
        ("kt_pfl", "predictions"),
        ("dense", "rule"),
        ("fedtgp", "statistics"),
        ("fedgh", "statistics"),
        ("fedavg", "predictions"),
        ("fedproto", "predictions"),
        ("hybrid", "statistics"),
    ],
)
def test_rule_without_effect_is_refused(method: str, key: str) -> None:
    refused(
        f"aggregation.{key}=median has no effect: {method} does not aggregate",
        method,
        aggregation={key: "median", "malicious": 1},
    )


@pytest.mark.parametrize("method", ["local", "centralized", "ensemble"])
def test_baselines_refuse_rules_and_attacks(method: str) -> None:
    refused(
        f"aggregation.rule=median cannot be combined with algorithm.name={method}",
        method,
        aggregation={"rule": "median"},
    )
    refused(
        f"attacks.name=scaled cannot be combined with algorithm.name={method}",
        method,
        attacks={"name": "scaled"},
    )


def test_rule_refuses_separately_averaged_tensors() -> None:
    refused(
        "algorithm.name=heterofl, which averages 'head' separately",
        "heterofl",
        "cnn_gn_small",
        aggregation={"rule": "median"},
        algorithm__masked=True,
    )


def test_fltrust_requires_full_models_and_a_proxy_set() -> None:
    trust = {"rule": "fltrust", "malicious": 1}
    refused(
        "aggregation.rule=fltrust requires a proxy set",
        aggregation=trust,
        data__proxy__size=0,
    )
    for method in ("fedper", "fml", "scaffold"):
        refused("fltrust requires whole models averaged by architecture", method, aggregation=trust)
    prepare(small("hybrid", aggregation=trust))


def test_uploads_without_a_rule_are_noted() -> None:
    notes = prepare(small("hybrid", aggregation={"rule": "median", "malicious": 1})).notes
    assert any(
        "aggregation.predictions=mean: logits of malicious clients are averaged" in note
        for note in notes
    )
    assert not any(
        "=mean: " in note
        for note in prepare(small("fedavg", aggregation={"rule": "median", "malicious": 1})).notes
    )


@pytest.mark.parametrize(
    "name", [n for n in ATTACKS if n in ("flipped", "confident_wrong", "targeted", "collusion")]
)
def test_attack_on_predictions_requires_predictions(name: str) -> None:
    refused(
        (
            f"attacks.name={name} changes predictions, which "
            "algorithm.name=fedavg does not upload here"
        ),
        attacks={"name": name},
    )
    prepare(small("fedmd", attacks={"name": name}))


def test_invalid_attack_settings_raise_one_line() -> None:
    refused(
        "algorithm.name=fedkd, which uploads factors of updates",
        "fedkd",
        attacks={"name": "sign_flip"},
    )
    refused(
        "attacks.target: class must be < 10",
        attacks={"name": "backdoor", "target": 10},
    )
    refused(
        "attacks.trigger: must be <= 8",
        attacks={"name": "backdoor", "trigger": 9},
    )
    refused("attacks.from_round: must be <= ", attacks={"name": "scaled", "from_round": 9})
    refused(
        "attacks.pairs: class must be < 10",
        attacks={"name": "label_flip", "pairs": {0: 11}},
    )
    refused(
        "every evaluated client is malicious",
        attacks={"name": "scaled", "clients": [f"site_{i}" for i in range(1, 8)]},
    )


class Largest(Rule):
    """Custom rule for parameters."""

    def combine(self, block, num_malicious):
        return {name: block.stack(name).amax(0) for name in block.names}


class Quiet(PredictionRule):
    """Custom rule for predictions."""

    def combine(self, predictions, num_malicious, clients, memory):
        return 0 * predictions[0]


class Zeros(Attack):
    """Custom attack that uploads zero updates."""

    acts_on = frozenset({"updates"})

    def poison_updates(self, true_uploads, context):
        return 0 * true_uploads


def test_custom_rules_and_attacks() -> None:
    this_module = "python:tests.experiment.test_robustness_checks"
    source = small(
        "hybrid",
        aggregation={
            "rule": f"{this_module}:Largest",
            "predictions": f"{this_module}:Quiet",
            "malicious": 1,
        },
        attacks={"name": f"{this_module}:Zeros"},
        algorithm__distill_at="client",
        rounds=1,
    )
    rounds = rounds_of(source)
    assert not rounds.server.state["teacher"].softmax(-1).std() > 1e-6
    refused(
        "is not a subclass of hetero_fl.robustness.rules.Rule",
        aggregation={"rule": f"{this_module}:Zeros"},
    )
    refused(
        "attacks.name: module 'tests.experiment.test_robustness_checks' has no 'Zeroes'",
        attacks={"name": f"{this_module}:Zeroes"},
    )


def test_run_reports_malicious_clients(tmp_path) -> None:
    source = small(
        "hybrid",
        aggregation={"predictions": "down_weight", "malicious": 2},
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
        and attacks["liars"] == ["site_2", "site_6"]  # style: ok (file key)
        and 0 <= attacks["success"] <= 1
    )
    records = finished.directory.metrics()
    malicious = [r["attacks"]["liars"] for r in records]  # style: ok (file key)
    assert malicious == [[], ["site_2", "site_6"]]
    assert [c["id"] for c in finished.summary["clients"]] == [f"site_{i}" for i in (1, 3, 4, 5, 7)]
    assert (
        "2 of 7 clients are malicious (backdoor, from round 2): site_2, site_6"
        in (tmp_path / "run" / "log.txt").read_text()
    )
