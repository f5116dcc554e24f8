"""Configurations that cannot work are refused on loading, in one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest

from hetero_fl.data import make_table
from hetero_fl.data.remote import describe_client_rows, restrict_to_holder
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.utils.errors import UserError
from tests.support.federations import config

GROUP_NORM = [{"name": "cnn", "width": 4, "norm": "group"}]
DIFFERENT = [
    {"name": "mlp", "hidden": [8]},
    {"name": "mlp", "hidden": [12]},
    {"name": "mlp", "hidden": [16]},
]


def refused(words: str, *source: Any, **changes: Any) -> None:
    with pytest.raises(UserError) as error:
        prepare(config(*source, **changes))
    assert words in str(error.value), str(error.value)


def accepted(*source: Any, **changes: Any) -> PreparedRun:
    return prepare(config(*source, **changes))


def test_batch_norm_refuses_batches_of_one() -> None:
    def batches_of_one(models: Any, method: str = "fedavg", **changes: Any) -> dict[str, Any]:
        source = config(method, models, **changes)
        source["clients"]["defaults"]["batch_size"] = 1
        return source

    with pytest.raises(
        UserError, match="clients: 'site_1': batch_size: got 1, but cnn_bn_small has BatchNorm"
    ):
        prepare(batches_of_one("cnn_bn_small"))
    assert prepare(batches_of_one(GROUP_NORM)).federation.client_infos


@pytest.mark.parametrize("method", ["fedmd", "feddf", "hybrid"])
def test_batch_norm_refuses_proxy_batches_of_one(method: str) -> None:
    refused(
        "algorithm.proxy_batch_size: got 1, but cnn_bn_small",
        method,
        algorithm__proxy_batch_size=1,
    )
    refused("data.proxy: has 1 row, but cnn_bn_small", method, data__proxy__size=1)
    accepted(method, GROUP_NORM, algorithm__proxy_batch_size=1)
    student = {"model": "cnn_bn_small"}
    refused(
        "got 1, but cnn_bn_small",
        method,
        GROUP_NORM,
        algorithm__proxy_batch_size=1,
        server=student,
    )


@pytest.mark.parametrize("method", ["fedmd", "feddf", "kt_pfl"])
def test_missing_proxy_set_names_the_key(method: str) -> None:
    refused(
        f"{method} requires a proxy set; set data.proxy.size > 0",
        method,
        data__proxy__size=0,
    )
    accepted(method, data__proxy__size=10)


def test_proxy_batch_size_is_ignored_without_a_proxy_set() -> None:
    accepted("hybrid", data__proxy__size=0, algorithm__proxy_batch_size=1)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedper", "lg_fedavg"])
def test_averaging_requires_a_shared_tensor(method: str) -> None:
    words = (
        "no two clients upload the same tensor; give clients the same model, "
        "let their shares overlap"
    )
    refused(words, method, DIFFERENT)
    # two of four clients have the same model
    accepted(method, DIFFERENT, clients=4)
    accepted(method, DIFFERENT[:1], clients=1)


def test_averaging_check_considers_uploads_only() -> None:
    words = "no two clients upload the same tensor"
    refused(words, "hybrid", DIFFERENT, data__proxy__size=0)
    accepted("hybrid", DIFFERENT)
    refused(words, "hybrid", data__proxy__size=0, clients__defaults__shares=["predictions"])
    # there is a proxy set, but no client uploads predictions
    refused(words, "hybrid", DIFFERENT, clients__defaults__shares=["parameters"])
    # lg_fedavg averages heads only
    refused(words, "lg_fedavg", clients__defaults__shares=["backbone"])
    accepted("fedper", clients__defaults__shares=["backbone"])
    only_one = [{"match": "site_[12]", "shares": ["predictions"]}]
    refused(words, "fedavg", clients__overrides=only_one)
    # feddf also distills
    accepted("feddf", DIFFERENT)


@pytest.mark.parametrize("align", [0.0, 0.5])
def test_label_counts_alone_are_refused(align: float) -> None:
    words = "no two clients upload the same tensor"
    refused(words, "hybrid", DIFFERENT, data__proxy__size=0, algorithm__align=align)
    for method, needed in (("fedmd", "predictions"), ("feddf", "parameters or predictions")):
        changes = {"clients__defaults__shares": ["statistics"], "algorithm__align": align}
        refused(f"{method} requires clients that share {needed}", method, **changes)


def test_common_prefixes_are_checked() -> None:
    models = [{"name": "mlp", "hidden": [8, n]} for n in (4, 6, 8)]
    refused("no two clients", "fedavg", models)
    assert accepted("fedavg", models, clients__common=["backbone."]).notes == []
    # of different shapes
    refused("no two clients", "fedavg", DIFFERENT, clients__common=["head.weight"])
    refused(
        "clients.common: no model has a tensor with prefix 'backbon_'; did you mean 'backbone.'?",
        "fedavg",
        clients__common=["backbon_"],
    )
    refused("did you mean 'head.'?", "fedmd", clients__common=["backbone.", "heads."])


def test_single_client_of_an_architecture_is_noted() -> None:
    # the first and the third of three clients have the same model
    (note,) = accepted("fedavg", DIFFERENT[:2]).notes
    assert note == (
        "fedavg averages clients with the same architecture: "
        "mlp(1x8x8->10, hidden=(12,)) has only one client"
    )


def test_several_single_clients_are_noted() -> None:
    # the first and the fourth client have the same model
    (note,) = accepted("fedavg", [*DIFFERENT[:2], "linear"], clients=4).notes

    assert note.startswith("fedavg averages clients with the same architecture: mlp(")
    assert note.endswith(") have only one client")


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1] * 9, "site_1': class_weights: expected 10 numbers"),
        ([1] * 9 + [-1], "site_1': class_weights: must be >= 0, got -1"),
        ([0] * 10, "site_1': class_weights: [0.0, "),
        ([1] * 9 + [float("nan")], "class_weights"),
        ([1] * 9 + [float("inf")], "class_weights"),
    ],
)
def test_invalid_class_weights_raise_one_line(weights: list[float], words: str) -> None:
    refused(words, clients__defaults__class_weights=weights)


def test_class_weights_are_not_checked_against_private_label_counts() -> None:
    prepared = accepted("fedavg", "mlp", clients__defaults__class_weights=[1] * 9 + [0])
    data = prepared.data
    infos = {
        name: describe_client_rows(data, name, send_view=True, labels=False)
        for name in data.client_ids
    }

    server = prepare(prepared.config, data=restrict_to_holder(data, None, infos))

    assert not any(server.data.reveals_labels(name) for name in data.client_ids)


def test_class_weights_require_a_multiclass_task() -> None:
    source = config("fedavg", "mlp", data__proxy__size=0)
    prepare(source, dataset=make_table(kind="regression"))
    source["clients"]["defaults"]["class_weights"] = "balanced"
    with pytest.raises(
        UserError,
        match=r"class_weights: requires a multiclass task, .* regression task",
    ):
        prepare(source, dataset=make_table(kind="regression"))
    prepare(config(clients__defaults__class_weights="balanced"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"algorithm": {"nmae": "fedavg"}},
            r"algorithm\.nmae: unknown key; did you mean 'name'\?",
        ),
        (
            {"data": {"name": "digits", "train_limit": 60, "proxy": {"size": 60}}},
            r"data\.proxy\.size: must be smaller than data\.train_limit=60, got 60",
        ),
    ],
)
def test_misspelled_key_and_large_proxy_set_raise_one_line(
    changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        prepare({**config(), **changes})
