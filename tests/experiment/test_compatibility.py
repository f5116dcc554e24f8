"""Valid configurations: notes on averages, and label counts that a client keeps private."""

from __future__ import annotations

from hetero_fl.data.federated_data import describe_client_rows, restrict_to_holder
from hetero_fl.experiment import prepare
from tests.support.federations import config


def test_class_weights_are_not_checked_against_private_label_counts() -> None:
    prepared = prepare(config(models="mlp", clients__defaults__class_weights=[1] * 9 + [0]))
    data = prepared.data
    infos = {
        name: describe_client_rows(data, name, send_view=True, labels=False)
        for name in data.client_ids
    }

    server = prepare(prepared.config, data=restrict_to_holder(data, None, infos))

    assert not any(server.data.reveals_labels(name) for name in data.client_ids)
