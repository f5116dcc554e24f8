"""Features that exclude each other, and rules: one line names both keys."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hetero_fl.algorithms import FedAvg, local_fit
from hetero_fl.core.payload import Item, ItemSpec
from hetero_fl.core.plan import Predict
from hetero_fl.data import Dataset, make_table
from hetero_fl.experiment import prepare
from hetero_fl.experiment.compatibility.features import FEATURES
from hetero_fl.experiment.compatibility.rules import RULES
from tests.support.federations import config
from tests.support.mistakes import refusal

THIS_MODULE = f"python:{__name__}"
ASYNC = {"threads": 1, "mode": "async"}
NOISE = {"noise_multiplier": 1.0, "delta": 1e-4}
RECORD = {"unit": "record", "accountant": "rdp", **NOISE}
CLIENT = {"unit": "client", **NOISE}
MEDIAN = {"rule": "median", "malicious": 1}
MLP = {"name": "mlp", "hidden": [8]}
DIFFERENT = [{"name": "mlp", "hidden": [width]} for width in (8, 12, 16)]


class Unstructured(FedAvg):
    """Upload parameters that no client received."""

    uploads = {"vector": ItemSpec("params", share="statistics")}

    def train(self, client: Any, received: Any) -> Any:
        yield local_fit(client)
        return {"vector": Item(torch.ones(3), 1.0, "params")}

    def aggregate(self, server: Any, uploads: Any) -> Any:
        yield from ()


class Impatient(FedAvg):
    """Read training rows in a step that the privacy accountant does not count."""

    def train(self, client: Any, received: Any) -> Any:
        yield Predict("model")
        return (yield from super().train(client, received))


class LateTrainer(FedAvg):
    """Train on private rows before evaluation."""

    def personalize(self, client: Any, received: Any) -> Any:
        yield local_fit(client)


def secure(method: str = "fedavg", clients: int = 4, **section: Any) -> dict[str, Any]:
    return config(method, MLP, clients, channel__secure_sum=section)


def encrypted(method: str = "fedavg", **changes: Any) -> dict[str, Any]:
    return config(method, MLP, 4, **{"channel__homomorphic": {}, **changes})


def attacked(name: str, method: str = "fedavg", models: Any = MLP, **changes: Any) -> Any:
    section = changes.pop("section", {})
    return config(method, models, 4, attacks={"name": name, **section}, **changes)


def robust(method: str = "fedavg", clients: int = 4, **changes: Any) -> dict[str, Any]:
    return config(method, changes.pop("models", MLP), clients, **{"aggregation": MEDIAN, **changes})


def weighted(weights: Any) -> dict[str, Any]:
    return config(clients__defaults__class_weights=weights)


# Configurations that violate each rule, or in which features exclude each other.
VIOLATIONS: dict[str, dict[str, Any]] = {
    "cohort_larger_than_population": config(clients__per_round=9),
    "sampled_clients_share_rarely": config(clients__per_round=2, clients__defaults__share_every=2),
    "synchronous_buffer": config(runtime={"buffer": 3}),
    "synchronous_staleness": config(runtime={"staleness": {"a": 1.0}}),
    "asynchronous_secure_sum": config(runtime=ASYNC, channel__secure_sum={}),
    "asynchronous_homomorphic": encrypted(runtime=ASYNC),
    "asynchronous_robustness": config(runtime=ASYNC, aggregation=MEDIAN),
    "asynchronous_clients_share_rarely": config(runtime=ASYNC, clients__defaults__share_every=2),
    "two_staleness_settings": config("fedbuff", runtime={"staleness": {"a": 1.0}}),
    "asynchronous_cohort": config(runtime=ASYNC, cohort={"least": 2}),
    "unused_partition": config(
        clients__groups=[{"name": "a", "model": MLP, "data": {"name": "chest_xray"}}]
    ),
    "unused_size": config(
        clients__overrides=[{"match": "a", "size": 2.0}],
        clients__groups=[
            {"name": "a", "model": MLP, "data": {"name": "chest_xray"}},
            {"name": "b", "model": MLP},
        ],
    ),
    "unused_partition_setting": config(data__partition={"kind": "iid", "alpha": 0.1}),
    "unused_proxy_setting": config(data__proxy={"labels": True}),
    "unused_client_option": config("centralized", clients__defaults__fine_tune_epochs=2),
    "private_asynchronous_run": config(runtime=ASYNC, privacy=CLIENT),
    "private_run_from_other_models": config(init_from="runs/other", privacy=CLIENT),
    "private_sampling": config(cohort={"sampling": "available"}, devices={}, privacy=CLIENT),
    "private_over_selection": config(
        clients__per_round=2, cohort={"over_selection": 1.5}, devices={}, privacy=CLIENT
    ),
    "distributed_noise_in_plain_sum": config(privacy={**CLIENT, "distributed": True}),
    "private_clients_robustness": config(aggregation=MEDIAN, privacy=CLIENT),
    "poisson_cohorts_secure_sum": config(
        channel__secure_sum={}, privacy={**CLIENT, "poisson_cohorts": True}
    ),
    "private_clients_homomorphic": encrypted(privacy=CLIENT),
    "private_clients_compression": config(channel={"compress": [{"quantize": 8}]}, privacy=CLIENT),
    "secure_sum_robustness": config(aggregation=MEDIAN, channel__secure_sum={}),
    "homomorphic_robustness": encrypted(aggregation=MEDIAN),
    "choice_among_all_clients": config(cohort={"over_selection": 1.5}, devices={}),
    "least_above_sampled": config(cohort={"least": 3}, clients__per_round=2),
    "over_selection_secure_sum": config(
        clients=8,
        clients__per_round=4,
        cohort={"over_selection": 2},
        devices={},
        channel__secure_sum={},
    ),
    "over_selection_without_time": config(cohort={"over_selection": 1.3}, clients__per_round=2),
    "task_of_method": config("fedproto", MLP, data__proxy__size=0),
    "no_proxy_set": config("fedmd", data__proxy__size=0),
    "no_proxy_labels": config("fedmd", algorithm__initial_phase=True, data__proxy__labels=False),
    "no_shares": config("fedmd", clients__defaults__shares=["statistics"]),
    "large_population": config(
        "ensemble",
        "linear",
        10_001,
        clients__per_round=2,
        data__partition={"kind": "drawn", "rows": 12, "alpha": 0.3, "min_size": 12},
        evaluation={"clients": 2},
    ),
    "unknown_part": config(clients__common=["backbon_"]),
    "part_of_other_model": config(
        "fml", "cnn_gn_small", algorithm__mentee="linear", clients__defaults__shares=["backbone.0."]
    ),
    "nothing_to_average": config("fedavg", DIFFERENT),
    "class_weights_of_other_task": config(
        models=MLP, data__proxy__size=0, clients__defaults__class_weights="balanced"
    ),
    "prior_of_other_task": config(
        models=MLP, data__proxy__size=0, clients__defaults__local_prior=True
    ),
    "correction_of_adjusted_predictions": config(
        "fedmd", algorithm={"name": "fedmd", "prior_correction": True, "logit_adjustment": True}
    ),
    "correction_without_counts": config(
        "feddf",
        clients__defaults={"prior_correction": True, "shares": ["parameters", "predictions"]},
    ),
    "alignment_of_mixed_predictions": config(
        "fedmd",
        algorithm={"name": "fedmd", "align": 1.0},
        clients__overrides=[{"match": "site_2", "logit_adjustment": True}],
    ),
    "number_of_class_weights": weighted([1] * 9),
    "weightless_client": config(
        clients__defaults__class_weights=[1, *[0] * 9],
        data__partition={"kind": "classes", "classes": 2, "min_size": 5},
    ),
    "zero_class_weights": weighted([0] * 10),
    "batches_of_one": config(clients__defaults__batch_size=1),
    "secure_sum_of_single_uploads": secure("kt_pfl"),
    "secure_sum_compression": config(
        channel={"secure_sum": {}, "compress": [{"topk": 0.1}]},
    ),
    "secure_sum_of_few": secure(clients=2),
    "secure_sum_of_many": config(
        "fedavg", MLP, 201, channel__secure_sum={}, data__partition={"kind": "drawn"}
    ),
    "high_threshold": secure(threshold=5),
    "low_threshold": secure(threshold=2),
    "large_range": secure(range=1e19),
    "many_fraction_bits": secure(fraction_bits=45),
    "homomorphic_server_step": encrypted("fedavgm"),
    "homomorphic_shares": encrypted(
        clients__groups=[
            {"name": "a", "model": MLP, "count": 2},
            {"name": "b", "model": MLP, "count": 2, "shares": ["backbone"]},
        ]
    ),
    "homomorphic_compression": encrypted(channel__compress=[{"quantize": 8}]),
    "homomorphic_broadcasts": encrypted(channel__compress_down=["half"]),
    "homomorphic_server_model": encrypted("fedmd", server__model="linear"),
    "large_homomorphic_range": encrypted(channel__homomorphic={"range": 1e14}),
    "many_homomorphic_fraction_bits": encrypted(channel__homomorphic={"fraction_bits": 45}),
    "robustness_without_uploads": robust("local"),
    "idle_rule": robust("fedmd"),
    "rule_beside_model": robust("heterofl", models="cnn_gn_small", algorithm__masked=True),
    "exclusive_rule": robust(
        "fedmd",
        aggregation={"predictions": "agreement", "malicious": 1},
        data__name="synthetic_table",
    ),
    "outvoted_rule": robust(aggregation={"rule": "median", "malicious": 3}),
    "attack_on_nothing": attacked("confident_wrong"),
    "attack_on_factors": attacked("sign_flip", "fedkd"),
    "attack_on_classes": attacked("label_flip", data__proxy__size=0),
    "trigger_of_other_task": attacked("backdoor"),
    "trigger_without_images": attacked("backdoor"),
    "attack_after_the_run": attacked("sign_flip", section={"from_round": 9}),
    "trigger_larger_than_images": attacked("backdoor", section={"trigger": 9}),
    "unknown_class_in_attack": attacked("backdoor", section={"target": 10}),
    "asynchronous_single_uploads": config("kt_pfl", runtime=ASYNC),
    "asynchronous_proxy_rows": config("fedmd", runtime=ASYNC, algorithm__proxy_rows=20),
    "buffer_of_one": config("fedasync", runtime={"buffer": 3}),
    "two_buffers": config("fedbuff", clients=4, runtime={"buffer": 3}),
    "instant_clients": config(
        runtime=ASYNC,
        devices={},
        clients__overrides=[{"match": "site_1", "machine": {"speed": 1e6}}],
    ),
    "large_buffer": config(runtime={**ASYNC, "buffer": 7}),
    "patience_without_validation": config(
        evaluation={"patience": 2}, data__validation=0, data__split={"validation": 0, "test": 0.2}
    ),
    "private_rows_in_one_place": config("centralized", privacy=RECORD, models=MLP),
    "private_statistics": config(
        models=MLP, privacy=CLIENT, clients__defaults__preprocess={"normalize": "own"}
    ),
    "private_initial_phase": config(
        "fedmd", MLP, algorithm__initial_phase=True, data__proxy__labels=True, privacy=RECORD
    ),
    "private_rows_sent": config("fedgkt", "cnn_gn_small", privacy=RECORD),
    "private_records_mixed": config(models="cnn_bn_small", privacy=RECORD),
    "private_fine_tuning": config("fedbabu", "cnn_gn_small", privacy=RECORD),
    "private_records_in_evaluation": config(f"{THIS_MODULE}:LateTrainer", MLP, privacy=RECORD),
    "private_records_unaccounted": config(f"{THIS_MODULE}:Impatient", MLP, privacy=RECORD),
    "clip_of_unknown_item": config(models=MLP, privacy={**CLIENT, "clip": {"modle": 1.0}}),
    "votes_without_classes": config(models=MLP, privacy={**CLIENT, "votes": True}),
    "bounded_factors": config("fedkd", "cnn_gn_small", privacy={**CLIENT, "unit": "local"}),
    "private_clients_single_uploads": config("feddf", "cnn_gn_small", privacy=CLIENT),
    "bounded_uploads_share_rarely": config(
        models=MLP, privacy=CLIENT, clients__defaults__share_every=2
    ),
    "parameters_without_start": config(
        f"{THIS_MODULE}:Unstructured", MLP, privacy=CLIENT, clients__defaults__shares=["statistics"]
    ),
}


# data sets of the configurations that do not use digits
DATASETS: dict[str, Dataset] = {
    "task_of_method": make_table(kind="regression"),
    "class_weights_of_other_task": make_table(kind="regression"),
    "prior_of_other_task": make_table(kind="regression"),
    "exclusive_rule": make_table(kind="multilabel"),
    "attack_on_classes": make_table(kind="regression"),
    "trigger_of_other_task": make_table(kind="multilabel"),
    "trigger_without_images": make_table(),
}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Return the messages of all configurations that violate something."""
    return [
        refusal(prepare, source, dataset=DATASETS.get(name)) for name, source in VIOLATIONS.items()
    ]


def test_features_that_exclude_each_other_are_named(lines: list[str]) -> None:
    words = [line.partition(", because it needs ") for line in lines if "because it needs" in line]
    refused = {need.partition(";")[0] for _, _, need in words}

    needs = {need for feature in FEATURES for need in feature.needs}
    assert needs == {need for feature in FEATURES for need in feature.denies} == refused
    keys = {feature.key for feature in FEATURES}
    for settings, _, _ in words:
        one, other = settings.split(" cannot be combined with ")
        assert {one.partition("=")[0], other.partition("=")[0]} <= keys


def test_rule_is_violated_in_one_line_with_both_keys(
    lines: list[str], subtests: pytest.Subtests
) -> None:
    for rule in RULES:
        with subtests.test(message=rule.message):
            words = [re.escape(part) for part in re.split(r"\{[^{}]*\}", rule.message)]
            found = [line for line in lines if re.fullmatch(".*".join(words), line)]

            assert found
            for line in found:
                assert [key for key in rule.keys if key.rpartition(".")[2] not in line] == []
