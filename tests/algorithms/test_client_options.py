"""Client options: their meaning for each method, and methods that do not use them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.data import Dataset, make_table
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federations import METHODS, config, deployed, rounds_of

FINE_TUNING = {"fine_tune_epochs": 2}
CORRECTION = {"prior_correction": True}
PROXY = {"recalibrate": ["proxy_predictions"]}
BY_PROTOTYPE = ("fedproto", "fedtgp")

# Methods by the options that they do not use. All use logit adjustment, except FedLC.
NO_FINE_TUNING = {"centralized", "ensemble", "dense", "ditto", "fml", "fedkd", "fedmrl", "fedgkt"}
CORRECTED_TESTS = {"local", "ensemble", "fedper", "fedrep", "fedbabu", "fedmd", "fd", "fedmrl"}
PROXY_PREDICTIONS = {"fedmd", "ds_fl", "kt_pfl", "feddf", "hybrid"}


def is_refused(method: str, options: dict[str, Any]) -> bool:
    algorithm = {**config(method)["algorithm"], **options}
    try:
        prepare(config(method, clients=4, algorithm=algorithm))
    except UserError as error:
        (option,) = options
        place = f"clients.defaults.{option}"
        assert str(error).startswith(f"{place}: ")
        assert str(error).endswith(f"not used by algorithm.name={method}; remove it")
        return True
    return False


@each_case("method", METHODS)
def test_options_without_meaning_for_the_method_are_refused(method: Any) -> None:
    by_prototype = method in BY_PROTOTYPE
    # Hybrid adjusts logits by default, which cannot be combined with the correction.
    off = {"logit_adjustment": False} if method == "hybrid" else {}
    corrects = method in CORRECTED_TESTS | PROXY_PREDICTIONS

    assert is_refused(method, FINE_TUNING) == (method in NO_FINE_TUNING or by_prototype)
    assert is_refused(method, {"local_prior": True}) == by_prototype
    assert is_refused(method, PROXY) == (method not in PROXY_PREDICTIONS)
    assert is_refused(method, {"logit_adjustment": True}) == (method == "fedlc")
    if not off:
        assert is_refused(method, CORRECTION) != corrects
    # An option that is off is allowed everywhere.
    prepare(config(method, clients__defaults={"fine_tune_epochs": 0, "prior_correction": False}))


def test_prototype_methods_with_heads_use_all_options() -> None:
    for method in BY_PROTOTYPE:
        for options in (FINE_TUNING, CORRECTION, {"local_prior": True}):
            prepare(config(method, algorithm={"name": method, "inference": "head", **options}))


def test_options_with_class_frequencies_require_a_multiclass_task() -> None:
    for options in ({"logit_adjustment": True}, {"local_prior": True}, CORRECTION):
        (name,) = options
        with pytest.raises(
            UserError, match=rf"{name}: requires a multiclass task, .* regression task"
        ):
            prepare(regression("fedmd", **options), dataset=table())


def table() -> Dataset:
    return make_table(kind="regression")


def regression(method: str, **options: Any) -> dict[str, Any]:
    model = {"name": "mlp", "hidden": [8]}
    return config(method, model, algorithm={"name": method, **options})


def test_settings_without_effect_are_noted() -> None:
    notes = prepare(regression("hybrid", sharpen="era"), dataset=table()).notes
    for key in ("align", "sharpen"):
        text = f"algorithm.{key} has no effect, because the data set has a regression task"
        assert text in notes
    assert any(line.startswith("algorithm.teacher=contrast weights clients") for line in notes)

    options = {"name": "fedavg", "recalibrate": ["global_test"]}
    notes = prepare(config(algorithm=options, data__proxy__size=0)).notes
    assert (
        "clients.defaults.recalibrate has no effect without a proxy set (data.proxy.size is 0)"
        in notes
    )
    assert not any("no effect" in line for line in prepare(config("hybrid")).notes)


def test_override_of_an_option_replaces_both_keys() -> None:
    places = ("algorithm", "clients.defaults")
    for place, override in itertools.product(places, places):
        source = config("fedavg", clients__groups=[{"name": "site", "count": 3}])
        section = source["algorithm"] if place == "algorithm" else source["clients"]["defaults"]
        section["logit_adjustment"] = True

        prepared = prepare(source, [f"{override}.logit_adjustment=false"])

        assert prepared.federation.client_infos["site_1"].settings.logit_adjustment is False


def fine_tune_epochs(source: dict[str, Any]) -> int | None:
    return prepare(source).federation.client_infos["site_1"].settings.fine_tune_epochs


def test_fedbabu_fine_tunes_for_the_epochs_of_the_client() -> None:
    assert fine_tune_epochs(config("fedbabu")) == 5
    assert fine_tune_epochs(config("fedbabu", clients__defaults__fine_tune_epochs=3)) == 3
    tuned, not_tuned = (
        deployed(
            rounds_of(config("fedbabu", rounds=1, algorithm__fine_tune_epochs=epochs)), "site_1"
        ).models["model"]["head.weight"]
        for epochs in (1, 0)
    )
    assert not torch.equal(tuned, not_tuned)


@pytest.mark.parametrize("executor", ["serial", "batched"])
def test_fine_tuning_before_local_tests_leaves_the_global_test(executor: str) -> None:
    found = {}
    for name, options in {
        "none": {},
        "all": {"fine_tune_epochs": 2},
        "local": {"fine_tune_epochs": 2, "fine_tune_before": "local_tests"},
    }.items():
        source = config("fedavg", rounds=2, clients__defaults=options, runtime__executor=executor)
        rounds = rounds_of(source)
        found[name] = {
            client: evaluation.scores for client, evaluation in rounds.evaluate().clients.items()
        }

    for client, scores in found["local"].items():
        for test, other in {
            "global": "none",
            "validation_global": "none",
            "personal": "all",
            "validation_personal": "all",
        }.items():
            assert scores[test] == found[other][client][test], (client, test)
    assert found["all"] != found["none"]


def test_saved_model_fine_tuned_for_local_tests_predicts_both_tests(tmp_path: Path) -> None:
    options = {"fine_tune_epochs": 2, "fine_tune_before": "local_tests"}
    plain, tuned = (
        hetero_fl.run(config("fedavg", rounds=1, clients__defaults=each), out=tmp_path / name)
        for name, each in (("plain", {}), ("tuned", options))
    )
    x = torch.rand(5, *tuned.models["site_1"].arch.input_shape)

    saved = tuned.models["site_1"]

    assert torch.equal(saved.logits(x), plain.models["site_1"].logits(x))
    assert not torch.equal(saved.logits(x), saved.logits(x, personal=True))
    assert saved.local_tensors.keys() >= saved.arch.parameter_names


def test_tests_of_fine_tuning_are_refused_with_personal_models() -> None:
    assert is_refused("ditto", {"fine_tune_before": "local_tests"})
    assert not is_refused("fedavg", {"fine_tune_before": "local_tests"})
