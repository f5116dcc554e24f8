"""Arguments of `Federation`: defaults, global sets, sampling, starting weights and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.core.task import Task
from hetero_fl.data import from_arrays
from hetero_fl.experiment import PreparedRun
from hetero_fl.utils.errors import UserError
from tests.support.python_federations import QUIET, Net, images, same_models, table


def two_clients(**settings: Any) -> list[hfl.Client]:
    return [
        hfl.Client("a", "mlp", images(40, 1), **settings),
        hfl.Client("b", "mlp", images(40, 2)),
    ]


def settings_of(prepared: PreparedRun, client: str) -> Any:
    return prepared.federation.client_infos[client].settings


def text_table(rows: int, seed: int, names: tuple[str, ...]) -> pd.DataFrame:
    frame = table(rows, seed).drop(columns="ill")
    return frame.assign(state=[names[i % len(names)] for i in range(rows)])


# Defaults of clients


def test_defaults_apply_to_clients_that_do_not_set_them() -> None:
    defaults = hfl.ClientSettings(epochs=3, optimizer=hfl.Adam(lr=0.05), batch_size=8)
    own = hfl.Federation(two_clients(epochs=2), test=images(30, 9), defaults=defaults)

    prepared = own.prepare(hfl.Local())

    assert [settings_of(prepared, client).epochs for client in "ab"] == [2, 3]
    assert [settings_of(prepared, client).optimizer.lr for client in "ab"] == [0.05, 0.05]
    assert [settings_of(prepared, client).batch_size for client in "ab"] == [8, 8]


def test_defaults_give_the_model_of_clients_without_model() -> None:
    clients = [hfl.Client("a", data=images(40, 1)), hfl.Client("b", "linear", images(40, 2))]
    own = hfl.Federation(
        clients, test=images(30, 9), defaults=hfl.ClientSettings(model={"name": "mlp"})
    )

    infos = own.prepare(hfl.Local()).federation.client_infos

    assert [infos[client].arch.name for client in "ab"] == ["mlp", "linear"]


def test_defaults_train_as_settings_of_each_client() -> None:
    optimizer = hfl.Adam(lr=0.05)
    common = hfl.Federation(
        two_clients(), test=images(30, 9), defaults=hfl.ClientSettings(optimizer=optimizer)
    )
    clients = [hfl.Client(c.name, "mlp", c.data, optimizer=optimizer) for c in two_clients()]
    each = hfl.Federation(clients, test=images(30, 9))

    first, second = (own.train(hfl.FedAvg(), rounds=1, overrides=QUIET) for own in (common, each))

    assert same_models(first, second)


# Global sets


def test_test_set_is_the_global_test_set() -> None:
    x, y = images(31, 9)
    prepared = hfl.Federation(two_clients(), test=(x, y)).prepare(hfl.Local())

    columns = prepared.data.columns("server", "common_test", prepared.data.preprocess("a"))

    assert torch.equal(columns["y"], torch.from_numpy(y))
    assert torch.equal(columns["x"], torch.from_numpy(x)[:, None].float() / 255)


def test_global_test_set_is_not_held_out_of_the_clients() -> None:
    prepared = hfl.Federation(two_clients(), test=images(31, 9)).prepare(hfl.Local())

    rows = {part: prepared.data.n_rows("a", part) for part in ("train", "validation", "test")}
    assert sum(rows.values()) == 40


def test_validation_set_is_the_global_validation_set() -> None:
    x, y = images(12, 7)
    own = hfl.Federation(two_clients(), test=images(30, 9), validation=(x, y))

    prepared = own.prepare(hfl.Local())
    run = own.train(hfl.Local(), rounds=1, overrides=QUIET)

    columns = prepared.data.columns("server", "common_validation", prepared.data.preprocess("a"))
    assert torch.equal(columns["y"], torch.from_numpy(y))
    assert torch.equal(columns["x"], torch.from_numpy(x)[:, None].float() / 255)
    assert run.metrics[0]["validation"]["global"]["accuracy"] * 12 % 1 == pytest.approx(0)


def test_no_validation_set_without_validation_rows() -> None:
    run = hfl.Federation(two_clients(), test=images(30, 9)).train(
        hfl.Local(), rounds=1, overrides=QUIET
    )

    assert run.metrics[0]["validation"]["global"] is None


# Clients per round


def test_per_round_samples_clients() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i)) for i in range(5)]
    own = hfl.Federation(clients, test=images(30, 9), per_round=2, seed=1)

    run = own.train(hfl.FedAvg(), rounds=4, overrides=QUIET)

    cohorts = [tuple(record["cohort"]) for record in run.metrics]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert len(set(cohorts)) > 1


def test_per_round_equals_the_configuration_key() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i)) for i in range(4)]
    argument = hfl.Federation(clients, test=images(30, 9), per_round=2)
    override = hfl.Federation(clients, test=images(30, 9))

    first = argument.train(hfl.FedAvg(), rounds=2, overrides=QUIET)
    second = override.train(hfl.FedAvg(), rounds=2, overrides=[*QUIET, "clients.per_round=2"])

    assert argument.config["clients"]["per_round"] == 2
    assert [r["cohort"] for r in first.metrics] == [r["cohort"] for r in second.metrics]
    assert same_models(first, second)


def test_cohort_section_samples_more_clients_than_are_averaged() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i)) for i in range(5)]
    own = hfl.Federation(clients, test=images(30, 9), per_round=2)

    run = own.train(
        hfl.FedAvg(),
        rounds=1,
        overrides=QUIET,
        cohort=hfl.Cohort(over_selection=2.0),
        devices=hfl.Devices(),
    )

    assert len(run.metrics[0]["cohort"]) == 4


# Starting weights


def start_of(own: hfl.Federation) -> dict[str, torch.Tensor]:
    """Return the head's weights of each client before the first round."""
    with hfl.Trainer(own, hfl.Local(), rounds=1, overrides=QUIET) as trainer:
        return {client.name: trainer.model(client.name).out.weight for client in own.clients}


@pytest.mark.parametrize("models", [(Net, Net), (Net(), Net())], ids=["class", "modules"])
def test_seeded_clients_of_one_architecture_start_with_equal_weights(models: Any) -> None:
    clients = [
        hfl.Client(f"site_{i}", model, images(40, i), init="seeded")
        for i, model in enumerate(models, 1)
    ]

    start = start_of(hfl.Federation(clients, test=images(30, 9)))

    assert torch.equal(start["site_1"], start["site_2"])


def test_seeded_weights_depend_on_the_seed_of_the_federation() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 40)
        own = hfl.Federation(
            [hfl.Client("a", Net(), images(40, 1), init="seeded")], test=images(30, 9), seed=seed
        )
        return start_of(own)["a"]

    first = start(1)

    assert not torch.equal(first, start(2))
    torch.manual_seed(0)
    assert torch.equal(first, start(1))


def test_given_module_and_seeded_module_start_apart() -> None:
    given, seeded = Net(), Net()
    clients = [
        hfl.Client("given", given, images(40, 1)),
        hfl.Client("seeded", seeded, images(40, 2), init="seeded"),
    ]

    start = start_of(hfl.Federation(clients, test=images(30, 9)))

    assert torch.equal(start["given"], given.out.weight)
    assert not torch.equal(start["seeded"], seeded.out.weight)
    assert not torch.equal(start["seeded"], given.out.weight)


# Labels


def test_class_names_are_sorted_over_all_data() -> None:
    names = ("class 10", "class 2", "class 1")
    clients = [
        hfl.Client("a", "mlp", text_table(60, 1, names[:2])),
        hfl.Client("b", "mlp", text_table(60, 2, names[1:])),
    ]
    own = hfl.Federation(clients, test=text_table(60, 3, names), label="state")

    prepared = own.prepare(hfl.FedAvg())

    assert prepared.federation.task.names == ("class 1", "class 2", "class 10")
    y = {c: set(prepared.data.client_rows[c]["train"].examples.y.tolist()) for c in "ab"}
    assert y == {"a": {1, 2}, "b": {0, 1}}


def test_text_labels_of_arrays_name_the_classes() -> None:
    x = table(60, 1)[["age", "dose"]].to_numpy("float32")
    y = np.array(["well", "ill"] * 30)
    own = hfl.Federation([hfl.Client("a", "mlp", (x, y))], test=(x, y))

    prepared = own.prepare(hfl.Local())

    assert prepared.federation.task.names == ("ill", "well")
    assert prepared.data.client_rows["a"]["train"].examples.y[:2].tolist() == [1, 0]


def test_label_column_of_a_client_replaces_that_of_the_federation() -> None:
    both = table(60, 1).assign(state=lambda frame: 1 - frame["ill"])
    other = both.rename(columns={"state": "outcome"})
    clients = [hfl.Client("a", "mlp", both, label="state"), hfl.Client("b", "mlp", other)]
    own = hfl.Federation(clients, label="outcome")

    prepared = own.prepare(hfl.Local())

    assert prepared.data.layout.columns == ("age", "dose", "ill")
    rows = prepared.data.client_rows["a"]["train"].examples
    # The labels are the column `state`, which is the opposite of the feature `ill`.
    assert torch.equal(rows.labels, 1 - rows.x[:, 2].long())


def test_names_of_classes_in_a_data_set_keep_their_order() -> None:
    x, y = images(40, 1, classes=2)
    task = Task("multiclass", 2, ("zoster", "acne"))
    dataset = from_arrays(x, y, task=task)

    prepared = hfl.Federation([hfl.Client("a", "mlp", dataset)], test=dataset).prepare(hfl.Local())

    assert prepared.federation.task.names == ("zoster", "acne")
    assert prepared.data.client_rows["a"]["train"].examples.y.tolist() == y.tolist()


def test_num_classes_sets_the_outputs_of_models() -> None:
    own = hfl.Federation(two_clients(), test=images(30, 9), num_classes=5)

    prepared = own.prepare(hfl.Local())

    assert prepared.federation.task.outputs == 5
    assert prepared.federation.client_infos["a"].arch.shapes["head.weight"][0] == 5


def test_largest_label_of_all_data_sets_the_number_of_classes() -> None:
    own = hfl.Federation(two_clients(), test=images(30, 9, classes=6))

    assert own.prepare(hfl.Local()).federation.task.outputs == 6


# HeteroFL


def test_heterofl_refuses_given_weights() -> None:
    clients = [hfl.Client(name, Net(), images(40, i)) for i, name in enumerate("ab")]
    own = hfl.Federation(clients, test=images(30, 9))
    method = hfl.HeteroFL(model="cnn", widths=[1, 0.5])

    with pytest.raises(UserError, match="heterofl changes the models of clients") as caught:
        own.train(method, rounds=1, overrides=QUIET)

    assert "\n" not in str(caught.value)
