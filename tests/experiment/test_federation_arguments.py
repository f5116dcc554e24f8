"""Arguments of `Federation`: defaults, global sets, sampling, starting weights and labels."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.core.task import Task
from hetero_fl.data import from_arrays
from tests.support.python_federations import QUIET, Net, images, table


def two_clients(**settings: Any) -> list[hfl.Client]:
    return [
        hfl.Client("a", "mlp", images(40, 1), **settings),
        hfl.Client("b", "mlp", images(40, 2)),
    ]


def text_table(rows: int, seed: int, names: tuple[str, ...]) -> pd.DataFrame:
    frame = table(rows, seed).drop(columns="ill")
    return frame.assign(state=[names[i % len(names)] for i in range(rows)])


# Defaults of clients


def test_settings_of_clients_replace_the_defaults() -> None:
    defaults = hfl.ClientSettings(
        steps=3, optimizer=hfl.SGD(lr=0.2, momentum=0.9), batch_size=8, model={"name": "mlp"}
    )
    clients = [
        hfl.Client("a", data=images(40, 1), optimizer="adam", epochs=4),
        hfl.Client("b", "linear", images(40, 2)),
    ]

    prepared = hfl.Federation(clients, test=images(30, 9), defaults=defaults).prepare(hfl.Local())

    infos = [prepared.federation.client_infos[client] for client in "ab"]
    assert [info.arch.name for info in infos] == ["mlp", "linear"]
    own, other = (info.settings for info in infos)
    assert (own.optimizer.name, own.optimizer.lr, own.optimizer.momentum) == ("adam", 1e-3, 0.0)
    assert (own.epochs, own.steps, own.batch_size) == (4, None, 8)
    assert (other.optimizer.name, other.optimizer.lr, other.steps) == ("sgd", 0.2, 3)


# Global sets


def test_given_sets_are_the_global_sets() -> None:
    sets: dict[str, Any] = {"test": images(31, 9), "validation": images(12, 7)}
    own = hfl.Federation(two_clients(), **sets)

    data = own.prepare(hfl.Local()).data
    run = own.train(hfl.Local(), rounds=1, overrides=QUIET)

    for name, (x, y) in sets.items():
        columns = data.columns("server", f"common_{name}", data.preprocess("a"))
        assert torch.equal(columns["y"], torch.from_numpy(y))
        assert torch.equal(columns["x"], torch.from_numpy(x)[:, None].float() / 255)
    assert run.metrics[0]["validation"]["global"]["accuracy"] * 12 % 1 == pytest.approx(0)
    # They are not held out of the clients.
    assert sum(data.n_rows("a", part) for part in ("train", "validation", "test")) == 40


# Clients per round


def test_per_round_samples_clients() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i)) for i in range(5)]
    own = hfl.Federation(clients, test=images(30, 9), per_round=2, seed=1)

    run = own.train(hfl.FedAvg(), rounds=3, overrides=QUIET)

    assert own.config["clients"]["per_round"] == 2
    cohorts = [tuple(record["cohort"]) for record in run.metrics]
    assert {len(cohort) for cohort in cohorts} == {2} and len(set(cohorts)) > 1
    # Without a set of validation rows, there is no score.
    assert run.metrics[0]["validation"]["global"] is None


def test_cohort_section_samples_more_clients_than_are_averaged() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", images(40, i)) for i in range(5)]
    own = hfl.Federation(clients, test=images(30, 9), per_round=2)
    sections: dict[str, Any] = {"cohort": hfl.Cohort(over_selection=2.0), "devices": hfl.Devices()}

    run = own.train(hfl.FedAvg(), rounds=1, overrides=QUIET, **sections)

    assert len(run.metrics[0]["cohort"]) == 4


# Starting weights


def start_of(seed: int = 0, **clients: Any) -> dict[str, torch.Tensor]:
    """Return the head's weights of each client before the first round, all of them seeded."""
    own = hfl.Federation(
        [hfl.Client(name, model, images(40, 1), init="seeded") for name, model in clients.items()],
        test=images(30, 9),
        seed=seed,
    )
    with hfl.Trainer(own, hfl.Local(), rounds=1, overrides=QUIET) as trainer:
        return {name: trainer.model(name).out.weight for name in clients}


def test_seeded_weights_depend_on_the_architecture_and_the_seed() -> None:
    given = Net()

    start = start_of(1, a=Net, b=Net, c=given, d=Net())

    assert torch.equal(start["a"], start["b"]) and torch.equal(start["c"], start["d"])
    assert not torch.equal(start["c"], given.out.weight)
    torch.manual_seed(5)
    assert torch.equal(start["c"], start_of(1, c=Net())["c"])
    assert not torch.equal(start["c"], start_of(2, c=Net())["c"])


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


def test_largest_label_or_num_classes_sets_the_number_of_outputs() -> None:
    by_argument = hfl.Federation(two_clients(), test=images(30, 9), num_classes=5)
    by_labels = hfl.Federation(two_clients(), test=images(30, 9, classes=6))

    for own, outputs in ((by_argument, 5), (by_labels, 6)):
        federation = own.prepare(hfl.Local()).federation

        assert federation.task.outputs == outputs
        assert federation.client_infos["a"].arch.shapes["head.weight"][0] == outputs
