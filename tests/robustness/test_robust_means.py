"""Robust aggregation in rounds: per owner, unweighted, independent of arrival order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hetero_fl.aggregation import Upload, Uploads
from hetero_fl.aggregation.robust_means import AggregationRules
from hetero_fl.aggregation.uploads import MeanCombiner
from hetero_fl.config.protection import PREDICTIONS, RULES, AggregationConfig
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.task import Task
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of

pytestmark = pytest.mark.usefixtures("float64")
TASK = Task("multiclass", 4)
SPECS = {
    "model": ItemSpec("params"),
    "logits": ItemSpec("rows"),
    "features": ItemSpec("class_sums"),
    "said": ItemSpec("rows", use="each"),
}


def rules(**settings: Any) -> AggregationRules:
    return AggregationRules(AggregationConfig(**settings), TASK)


@pytest.fixture(scope="module")
def cards() -> list[Any]:
    """Return seven clients of two architectures, five and two."""
    source = config(
        "fedavg", [MIXED[1]] * 5 + [MIXED[2]] * 2, clients=7, rounds=1, data__partition__min_size=10
    )
    rounds = rounds_of(source, num_rounds=0)
    return [
        rounds.federation.client_infos[client_id]
        for client_id in sorted(rounds.federation.client_infos)
    ]


def uploads(
    cards: list[Any], items: list[dict[str, Item]], terms: AggregationRules | None, **more: Any
) -> Uploads:
    pairs = list(zip(cards, items, strict=True))
    combiner = MeanCombiner if terms is None else terms.combiner
    payloads = [
        Uploads([Upload(c, Payload(i)) for c, i in p], SPECS, new_combiner=combiner, **more)
        for p in (pairs, pairs[::-1])
    ]
    assert len(payloads[0]) == len(payloads[1])
    # Arrived in reverse order; the expected values below are in id order.
    return payloads[1]


def model(value: float, *names: str) -> Item:
    return Item({name: torch.full((2, 2), value) for name in names}, 1.0, "params")


def test_rule_applies_per_tensor_owner_without_weights(
    cards: list[Any],
) -> None:
    groups = [client_info.arch.spec_id for client_info in cards]
    large, small = max(groups, key=groups.count), min(groups, key=groups.count)
    values = iter([1.0, 2.0, 3.0, 4.0, 1e9])
    items = [
        {
            "model": Item(
                {"w": torch.full((2,), next(values) if g == large else 7.0)},
                1e6 if g == large else 1.0,
                "params",
            )
        }
        for g in groups
    ]
    got = uploads(cards, items, rules(rule="median", malicious=0))
    assert got.mean_by_group("model")[large]["w"].tolist() == [3, 3]
    assert got.mean_by_group("model")[small]["w"].tolist() == [7, 7]
    assert got.weights_by_group("model")[large] == {"w": 5.0}
    common = uploads(cards, items, rules(rule="median", malicious=0), common=["w"])
    assert common.mean_by_group("model")[small]["w"].tolist() == [4, 4]


def test_too_few_uploads_keep_tensors(cards: list[Any]) -> None:
    groups = [client_info.arch.spec_id for client_info in cards]
    large = max(groups, key=groups.count)
    terms = rules(rule="krum", malicious=1)
    means = uploads(cards, [{"model": model(1.0, "w")} for _ in cards], terms).mean_by_group(
        "model"
    )
    assert list(means[large]) == ["w"] and [list(t) for g, t in means.items() if g != large] == [[]]
    assert terms.too_few == {"model": ["w"]}


def test_parts_of_different_owners_are_separate_blocks(cards: list[Any]) -> None:
    same_model = [
        client_info for client_info in cards if client_info.arch.spec_id == cards[0].arch.spec_id
    ]
    items = [{"model": model(float(i), "body", *["head"][: i < 3])} for i in range(len(same_model))]
    items[2] = {
        "model": Item(
            {"body": torch.full((2, 2), 1e6), "head": torch.full((2, 2), 2.0)}, 1.0, "params"
        )
    }
    got = uploads(same_model, items, rules(rule="krum", malicious=0)).mean_by_group("model")[
        cards[0].arch.spec_id
    ]
    assert float(got["body"][0, 0]) < 10 and float(got["head"][0, 0]) <= 2


def test_prediction_distances_ignore_row_constants(cards: list[Any]) -> None:
    rows = [
        torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(len(cards))
    ]
    items = [{"logits": Item(r + 100 * i, 5.0**i, "rows")} for i, r in enumerate(rows)]
    got = uploads(cards, items, rules(predictions="median")).mean("logits")
    centred = torch.stack([r - r.mean(-1, keepdim=True) for r in rows])
    assert torch.allclose(got.softmax(-1), centred.median(0).values.softmax(-1), atol=1e-9)
    p = [{"logits": Item(r.softmax(-1))} for r in rows]
    assert torch.allclose(
        uploads(cards, p, rules(predictions="median")).mean("logits").sum(-1), torch.ones(3)
    )


def test_class_sums_use_median_of_class_means(
    cards: list[Any],
) -> None:
    counts = torch.tensor([[4.0, 0, 1]] * 2 + [[1.0, 2, 1]] * (len(cards) - 2))[..., None]
    means = torch.randn(len(cards), 3, 2, generator=torch.Generator().manual_seed(0))
    means[0] = 1e9
    items = [{"features": Item(m * c, c, "class_sums")} for m, c in zip(means, counts, strict=True)]
    terms = rules(statistics="median", malicious=2)
    got = uploads(cards, items, terms)
    mean, (total, weight) = got.mean("features"), got.total("features")
    assert torch.allclose(mean[0], means[:, 0].median(0).values) and torch.allclose(
        mean[1], means[2:, 1].median(0).values
    )
    assert (
        weight[:, 0].tolist() == [7, 5, 7]
        and torch.equal(total, mean * weight)
        and not terms.too_few
    )
    few = rules(statistics="median", malicious=3)
    assert uploads(cards, items, few).total("features")[1][:, 0].tolist() == [7, 0, 7]
    assert few.too_few == {"features": ["class 1"]}


def test_values_derived_by_the_server_use_the_rule(cards: list[Any]) -> None:
    items_sent = {
        client_info.client_id: Item(torch.full((2, 4), float(i)))
        for i, client_info in enumerate(cards)
    }
    for terms in (None, rules(predictions="median")):
        payloads = uploads(cards, [{"said": item} for item in items_sent.values()], terms)
        assert torch.allclose(payloads.consensus("said", items_sent), torch.full((2, 4), 3.0))
        assert payloads.consensus("said", {}) is None


SENDS = {
    "fedavg": "rule",
    "hybrid": "rule predictions",
    "feddf": "rule predictions",
    "fedmd": "predictions",
}
ALL = {"rule": RULES[1:], "predictions": PREDICTIONS[1:], "statistics": ("median",)}
MATRIX = [
    (method, key, value)
    for method, keys in {**SENDS, "fedproto": "statistics", "fd": "statistics"}.items()
    for key in keys.split()
    for value in ALL[key]
]


@each_case(("method", "key", "value"), MATRIX)
def test_every_rule_runs_with_every_supported_method(method: str, key: str, value: str) -> None:
    rounds = rounds_of(
        config(
            method,
            {"name": "mlp", "hidden": [8]},
            7,
            rounds=1,
            aggregation={key: value, "malicious": 1},
            data__partition={"kind": "iid", "min_size": 5},
            data__train_limit=200,
            data__test_limit=20,
        )
    )
    tensors = [t for model in rounds.server.models.values() for t in model.values()]
    assert all(bool(t.isfinite().all()) for t in tensors)
    other = rounds_of(
        config(
            method,
            {"name": "mlp", "hidden": [8]},
            7,
            rounds=1,
            data__partition={"kind": "iid", "min_size": 5},
            data__train_limit=200,
            data__test_limit=20,
        )
    )
    payloads, plain = ({**r.server.models, "state": r.server.state} for r in (rounds, other))
    # The rule had an effect.
    assert str(payloads) != str(plain)


def test_mean_rule_equals_plain_mean() -> None:
    one, other = (
        rounds_of(config("hybrid", MIXED, aggregation=a))
        for a in ({}, {"rule": "mean", "malicious": 1})
    )
    assert all(
        torch.equal(one.server.models[g][n], t)
        for g, model in other.server.models.items()
        for n, t in model.items()
    )


@each_case("name", [n for n in PREDICTIONS if n != "mean"])
def test_rules_handle_the_largest_floats(name: str, cards: list[Any]) -> None:
    """Use finite uploads whose row sums overflow."""
    most = torch.finfo(torch.float32).max
    items_sent = torch.randn(
        7, 6, 4, dtype=torch.float32, generator=torch.Generator().manual_seed(0)
    )
    items_sent[0], items_sent[0, :, 0] = most, -most
    terms = rules(predictions=name, malicious=1)
    for _ in range(2):
        got = uploads(cards, [{"logits": Item(row)} for row in items_sent], terms).mean("logits")
        assert got is not None and got.dtype == torch.float32 and float(got.abs().max()) < 5
