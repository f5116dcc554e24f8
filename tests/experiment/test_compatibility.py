"""Valid configurations: notes on averages, and label counts that a client keeps private."""

from __future__ import annotations

from hetero_fl.data.remote import describe_client_rows, restrict_to_holder
from hetero_fl.experiment import prepare
from tests.support.federations import config

DIFFERENT = [{"name": "mlp", "hidden": [width]} for width in (8, 12, 16)]


def test_common_prefixes_are_averaged_without_a_note() -> None:
    models = [{"name": "mlp", "hidden": [8, n]} for n in (4, 6, 8)]

    assert prepare(config(models=models, clients__common=["backbone."])).notes == []


def test_single_clients_of_an_architecture_are_noted() -> None:
    # In each federation, only the first and the last client have the same model.
    (one,) = prepare(config(models=DIFFERENT[:2])).notes
    (several,) = prepare(config(models=[*DIFFERENT[:2], "linear"], clients=4)).notes

    start = "fedavg averages clients with the same architecture: "
    assert one == start + "mlp(1x8x8->10, hidden=(12,)) has only one client"
    assert several.startswith(start + "mlp(")
    assert several.endswith(") have only one client")


def test_class_weights_are_not_checked_against_private_label_counts() -> None:
    prepared = prepare(config(models="mlp", clients__defaults__class_weights=[1] * 9 + [0]))
    data = prepared.data
    infos = {
        name: describe_client_rows(data, name, send_view=True, labels=False)
        for name in data.client_ids
    }

    server = prepare(prepared.config, data=restrict_to_holder(data, None, infos))

    assert not any(server.data.reveals_labels(name) for name in data.client_ids)
