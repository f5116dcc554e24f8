"""Temporal splits of dated data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import (
    DataConfig,
    PartitionConfig,
    ProxyConfig,
    SourceConfig,
)
from hetero_fl.core.metrics import score
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, FederatedData, federate, from_arrays, with_test
from hetero_fl.data.splits import split_by_date
from tests.support.federated_data import PLAIN, PLAIN_CLIENT, THREE, rows_of

NATURAL = PartitionConfig(kind="natural", min_size=2)


def dated(
    rows: int = 200, groups: list[str] | None = None, shuffled: bool = False, **other: object
) -> Dataset:
    """Return a data set whose inputs and targets are the times of the rows."""
    time = torch.arange(rows)
    time = (
        time[torch.randperm(rows, generator=torch.Generator().manual_seed(0))] if shuffled else time
    )
    return from_arrays(time[:, None].float(), time.float(), time=time, group=groups, **other)


def federated(
    dataset: Dataset, clients: dict[str, ClientSettings] | None = None, **config: object
) -> FederatedData:
    return federate(dataset, DataConfig(**config), clients or THREE, 0)


def test_cut_leaves_no_target_on_both_sides() -> None:
    later, before = split_by_date(torch.arange(101), 0.2)
    assert later.nonzero().flatten().tolist() == list(range(81, 101)) and before.sum() == 81
    later, before = split_by_date(torch.arange(101), 0.2, span=5)
    assert later.nonzero().flatten().tolist() == list(range(86, 101)) and before.sum() == 81
    same = torch.tensor([3, 3, 3, 9, 9])
    later, before = split_by_date(same, 0.5)
    assert (
        later.tolist() == [False] * 3 + [True] * 2 and before.tolist() == [True] * 3 + [False] * 2
    )


def test_default_test_set_is_the_last_fifth_in_time() -> None:
    full = with_test(dated(shuffled=True))
    assert full.test is not None and full.test.time is not None and full.train.time is not None
    assert int(full.train.time.max()) < int(full.test.time.min())
    assert len(full.test) == 40 and len(full.train) == 160


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_every_client_is_cut_by_date(kind: str) -> None:
    data = federated(dated(shuffled=True), partition=PartitionConfig(kind=kind, min_size=5))
    for client in data.client_ids:
        train, validation, test = (
            rows_of(data, client, name) for name in ("train", "validation", "test")
        )
        assert max(train) < min(validation) <= max(validation) < min(test)
    assert max(rows_of(data, "a", "train")) < min(rows_of(data, "", "common_validation"))
    assert max(rows_of(data, "", "common_validation")) < min(rows_of(data, "", "common_test"))


def test_natural_partition_uses_the_common_cuts() -> None:
    groups = [("b", "a", "c")[i % 3] for i in range(200)]
    data = federated(dated(groups=groups), partition=NATURAL)
    for place, client in enumerate("bac"):
        for split in ("train", "validation", "test"):
            assert {row % 3 for row in rows_of(data, client, split)} == {place}
    for split in ("validation", "test"):
        own = sorted(row for client in "abc" for row in rows_of(data, client, split))
        assert own == sorted(rows_of(data, "", f"common_{split}"))
    limited = federated(dated(groups=groups), partition=NATURAL, test_limit=5)
    assert limited.n_test == 5 and rows_of(limited, "a", "test") == rows_of(data, "a", "test")


def test_dates_and_units_belong_to_the_data() -> None:
    days = np.datetime64("2024-03-01") + np.arange(10).astype("timedelta64[D]")
    dataset = from_arrays(torch.zeros(10, 1), torch.zeros(10), time=days)
    one, other = dated(unit=torch.ones(200)), dated(unit=torch.full((200,), 2.0))

    assert dataset.train.time is not None and dataset.train.time.diff().tolist() == [86400] * 9
    assert federated(one).content_hash() != federated(other).content_hash()


def test_metrics_are_in_the_unit_of_the_target() -> None:
    task = Task("regression", 1)
    predictions, y, unit = (
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[2.0], [4.0]]),
        torch.tensor([10.0, 100.0]),
    )
    found, plain = score(task, predictions, y, unit), score(task, predictions, y)
    assert found["mae"] == (10 + 200) / 2 and plain["mae"] == 1.5
    assert found["rmse"] == pytest.approx(((100 + 40000) / 2) ** 0.5)
    assert found["r2"] == pytest.approx(1 - (100 + 40000) / (2 * 190**2))
    assert (
        score(Task("multiclass", 2), torch.zeros(2, 2), torch.tensor([0, 1]), unit)["accuracy"]
        == 0.5
    )


def test_extra_columns_follow_their_rows() -> None:
    dataset = dated(groups=["a", "b"] * 100)
    dataset.train = replace(
        dataset.train, unit=dataset.train.x[:, 0] + 1, baselines={"same": dataset.train.x.clone()}
    )
    data = federated(
        dataset, dict.fromkeys("ab", PLAIN_CLIENT), partition=NATURAL, proxy=ProxyConfig(size=20)
    )
    for owner, name in (("a", "test"), ("b", "validation"), ("", "common_test")):
        rows, extra = torch.tensor(rows_of(data, owner, name)), data.extra_columns(owner, name)
        assert extra.time is not None and extra.unit is not None
        assert torch.equal(extra.time, rows) and torch.equal(extra.unit, rows + 1.0)
        assert torch.equal(extra.baselines["same"][:, 0], rows.float())
        assert set(data.columns(owner or "a", name, PLAIN)) == {
            "x",
            "y",
        }  # extra columns are no inputs


Written = Callable[[str, str], str]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Written:
    """Write a module with a source `made`; return its name in configurations."""
    monkeypatch.syspath_prepend(str(tmp_path))
    head = (
        "import torch\nfrom dataclasses import replace\nfrom "
        "hetero_fl.data import from_arrays, with_test\n"
    )

    def write(module: str, result: str) -> str:
        (tmp_path / f"{module}.py").write_text(head + result)
        return f"python:{module}:made"

    return write


def test_client_source_keeps_its_cuts(written: Written) -> None:
    own = written(
        "own_dated",
        "def made(config, root):\n"
        "    t = torch.arange(1000, 1100)\n"
        "    whole = with_test(from_arrays(t[:, None].float(), t.float(), time=t))\n"
        "    rows = torch.arange(80)\n"
        "    return replace(whole, "
        "train=whole.train.select_rows(rows[:60]), "
        "validation=whole.train.select_rows(rows[60:]))\n",
    )
    clients = {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own))}
    data = federated(dated(), clients)
    assert rows_of(data, "b", "train") == list(range(1000, 1060))
    assert rows_of(data, "b", "validation") == list(range(1060, 1080))
    assert rows_of(data, "b", "test") == list(range(1080, 1100))


def test_client_source_is_cut_by_its_target_span(written: Written) -> None:
    """Cut by targets that reach three hours ahead, unlike those of the common set."""
    own = written(
        "own_span",
        "def made(config, root):\n"
        "    t = torch.arange(1000, 1100)\n"
        "    return replace(from_arrays(t[:, None].float(), t.float(), time=t), span=3)\n",
    )
    clients = {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own))}

    data = federated(dated(), clients)

    train, validation, test = (rows_of(data, "b", name) for name in ("train", "validation", "test"))
    assert max(train) + 3 < min(validation) and max(validation) + 3 < min(test)


def test_client_source_may_lack_unused_columns(written: Written) -> None:
    own = written(
        "own_columns",
        "def made(config, root):\n"
        "    x = torch.arange(60.0)[:, None]\n"
        "    parts = [(x[a:b], x[a:b, 0]) for a, b in ((0, 40), (40, 50), (50, 60))]\n"
        "    whole = from_arrays(*parts[0], validation=parts[1], test=parts[2], columns=['hour'])\n"
        "    for part, a in ((whole.train, 0), (whole.validation, 40), (whole.test, 50)):\n"
        "        part.time = torch.arange(a, a + len(part))\n"
        "    return whole\n",
    )
    time = torch.arange(200)
    common = from_arrays(
        torch.stack([time, time], 1).float(), time.float(), time=time, columns=["hour", "load"]
    )
    sees = PreprocessConfig(columns=["hour"])
    data = federated(
        common,
        {"a": PLAIN_CLIENT, "b": ClientSettings(data=SourceConfig(name=own), preprocess=sees)},
    )
    for split, first in (("validation", 40), ("test", 50)):
        assert data.columns("b", split, PLAIN)["y"].flatten().tolist() == list(
            range(first, first + 10)
        )
