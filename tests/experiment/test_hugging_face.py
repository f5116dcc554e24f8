"""Data sets of `datasets` and classifiers of `transformers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hetero_fl as hfl
from hetero_fl.data import Dataset, Vocabulary
from hetero_fl.utils.errors import UserError
from tests.support.python_federations import QUIET, images, table

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")


def image_set(rows: int, seed: int) -> Any:
    x, y = images(rows, seed)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["low", "middle", "high"])}
    )
    return datasets.Dataset.from_dict({"image": list(x), "label": y.tolist()}, features=features)


def table_set(rows: int, seed: int) -> Any:
    columns = table(rows, seed).astype({"ill": str})
    return datasets.Dataset.from_dict(columns.to_dict("list"))


def test_image_data_set_equals_arrays() -> None:
    hub, plain = (
        hfl.Federation([hfl.Client("a", "mlp", make(60, 1))], test=make(30, 9))
        for make in (image_set, images)
    )
    first, second = (own.train(hfl.Local(), rounds=1, overrides=QUIET) for own in (hub, plain))
    for name, tensor in first.models["a"].tensors.items():
        assert torch.equal(tensor, second.models["a"].tensors[name])
    assert first.models["a"].task.names == ("low", "middle", "high")


def test_table_data_set() -> None:
    clients = [hfl.Client(f"site_{i}", "mlp", table_set(50, i), label="ill") for i in (1, 2)]
    own = hfl.Federation(clients, test=table_set(30, 9), label="ill")
    assert own.train(hfl.FedAvg(), rounds=1, overrides=QUIET).summary["rounds_completed"] == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: table_set(30, 1), "label: missing"),
        (lambda: datasets.DatasetDict(train=table_set(30, 1)), "choose one split"),
    ],
    ids=["no label", "several splits"],
)
def test_data_set_that_does_not_fit(make: Any, words: str) -> None:
    with pytest.raises((UserError, TypeError), match=words) as caught:
        hfl.Federation([hfl.Client("a", "mlp", make())])
    assert "\n" not in str(caught.value)


def test_image_classifier() -> None:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    classifier = transformers.ViTForImageClassification(config)
    clients = [hfl.Client("a", classifier, images(40, 1)), hfl.Client("b", "mlp", images(40, 2))]
    own = hfl.Federation(clients, test=images(30, 9), proxy=images(30, 8)[0])

    run = own.train(hfl.FedMD(), rounds=1, overrides=QUIET)

    assert run.predict("a", images(5, 7)[0]).shape == (5, 3)
    assert "the head is 'classifier'" in (run.path / "log.txt").read_text()


def test_text_classifier() -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    rng = np.random.default_rng(0)

    def tokens(rows: int) -> Dataset:
        y = np.arange(rows) % 2
        x = rng.integers(2, 25, (rows, 6)) + 20 * y[:, None]
        return hfl.from_arrays(x, y, vocabulary=Vocabulary(buckets=48))

    classifier = transformers.BertForSequenceClassification(config)
    own = hfl.Federation([hfl.Client("a", classifier, tokens(40))], test=tokens(20))

    run = own.train(hfl.Local(), rounds=2, overrides=QUIET)

    assert run.summary["global"]["last"]["accuracy"] is not None
