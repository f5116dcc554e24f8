"""Rows of examples, and the views of them that clients and the server have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hetero_fl.config.clients import ClientSettings, PreprocessConfig, ScannerConfig
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, Examples, federate, make_table
from hetero_fl.data.client_rows import ClientRows
from hetero_fl.data.federated_data import describe_client_rows, restrict_to_holder
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.registry import import_reference
from tests.support.federated_data import PLAIN, PLAIN_CLIENT, THREE, everything, heterogeneous, view
from tests.support.mistakes import check_refused, refusal


def test_scanner_applies_to_private_rows_only(images: Dataset) -> None:
    dark = ClientSettings(scanner=ScannerConfig(brightness=-1.0))
    data = view(images, clients={"a": dark, "b": PLAIN_CLIENT})
    for split in ("train", "validation", "test"):
        assert data.columns("a", split, PLAIN)["x"].max() == 0
        assert data.columns("b", split, PLAIN)["x"].mean() > 0.3
    for name in ("proxy", "common_test", "common_validation"):
        assert data.columns("a", name, PLAIN)["x"].mean() > 0.3
    pooled = data.columns("server", "pooled", PLAIN)["x"]
    assert (
        pooled[: data.n_rows("a", "train")].max() == 0
        and pooled[data.n_rows("a", "train") :].mean() > 0.3
    )
    half = ClientSettings(scanner=ScannerConfig(contrast=0.5))
    once = view(images, clients={"a": half, "b": PLAIN_CLIENT})
    x, plain = (
        d.columns("a", "train", PLAIN)["x"]
        for d in (once, view(images, clients={"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}))
    )
    assert torch.allclose(x - 0.5, 0.5 * (plain - 0.5), atol=2 / 255)


def test_copy_with_other_rows_does_not_use_cached_values(images: Dataset) -> None:
    data = view(images)
    before = data.columns("one", "train", PLAIN)["x"]
    counts = data.label_counts("one")
    rows = dict.fromkeys(data.client_ids, data.client_rows["two"])

    other = data.with_rows(ClientRows(rows))

    assert torch.equal(other.label_counts("one"), data.label_counts("two"))
    assert torch.equal(
        other.columns("one", "train", PLAIN)["y"], data.columns("two", "train", PLAIN)["y"]
    )
    assert torch.equal(data.columns("one", "train", PLAIN)["x"], before)
    assert torch.equal(data.label_counts("one"), counts)


def test_private_label_counts_are_refused(images: Dataset) -> None:
    data = view(images)
    infos = {
        name: describe_client_rows(data, name, send_view=True, labels=name == "one")
        for name in data.client_ids
    }
    server = restrict_to_holder(data, None, infos)

    assert torch.equal(server.label_counts("one"), data.label_counts("one"))
    with pytest.raises(ValueError, match=r"^label_counts: two keeps its label counts private$"):
        server.label_counts("two")


def test_client_statistics_use_scanned_training_rows(images: Dataset) -> None:
    data = view(images)
    seen = data.columns("one", "train", data.preprocess("one"))["x"]
    assert abs(seen.mean()) < 1e-5 and abs(seen.std(correction=0) - 1) < 1e-5
    assert data.columns("two", "common_test", data.preprocess("two"))["x"].shape == (60, 3, 20, 20)
    assert data.preprocess("four") == PLAIN and data.input_shape == (1, 16, 16)
    server = data.server_preprocess(PreprocessConfig(normalize="own"))
    assert abs(data.columns("", "proxy", server)["x"].mean()) < 1e-5


def test_federated_data_of_multilabel_and_regression() -> None:
    for kind in ("multilabel", "regression"):
        data = federate(
            make_table(kind=kind), DataConfig(partition=PartitionConfig(kind="dirichlet")), THREE, 0
        )
        columns = data.columns("a", "train", PLAIN)
        assert columns["y"].dtype == torch.float32 and columns["y"].shape == (
            data.n_rows("a", "train"),
            3,
        )
        expected = (
            columns["y"].sum(0).tolist()
            if kind == "multilabel"
            else [data.n_rows("a", "train")] * 3
        )
        assert data.label_counts("a").tolist() == expected
        assert data.simulated and data.task == Task(kind, 3)


def test_results_are_cached_within_bounds(images: Dataset) -> None:
    data = view(images)
    assert data.columns("one", "proxy", PLAIN) is data.columns("two", "proxy", PLAIN)
    assert data.columns("one", "train", PLAIN) is data.columns("one", "train", PLAIN)
    assert data.columns("one", "train", PLAIN) is not data.columns("two", "train", PLAIN)
    limit = 60_000
    small = federate(images, DataConfig(), heterogeneous(), 0, cache_bytes=limit)
    first = small.columns("one", "train", PLAIN)["x"]
    largest = max(small.columns(c, "train", PLAIN)["x"].nbytes for c in small.client_ids)
    cached = small._private_columns
    num_bytes = sum(c.nbytes for columns in cached.values() for c in columns.values())
    assert num_bytes <= limit or len(cached) == 1
    assert (
        num_bytes < sum(small.n_rows(c, "train") for c in small.client_ids) * 1024 and largest > 0
    )
    # recomputed with equal noise
    assert torch.equal(small.columns("one", "train", PLAIN)["x"], first)
    torch.set_default_dtype(torch.float64)
    try:
        assert data.columns("one", "proxy", PLAIN)["x"].dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_raw_arrays_are_shared_and_unchanged(images: Dataset) -> None:
    before = images.train.x.clone()
    data = view(images)
    everything(data)
    assert torch.equal(images.train.x, before)
    assert all(
        s.examples.x is images.train.x
        for parts in data.client_rows.values()
        for s in parts.values()
    )


def test_hash_sees_every_image_and_label(images: Dataset) -> None:
    plain = DataConfig(proxy=ProxyConfig(size=50))
    expected = federate(images, plain, THREE, 0).content_hash()
    assert images.train.y is not None and images.test is not None
    rows = federate(images, plain, THREE, 0).client_rows["b"]["validation"].rows
    other_x, other_y, other_test = (
        images.train.x.clone(),
        images.train.y.clone(),
        images.test.x.clone(),
    )
    other_x[rows[-1], 0, 15, 15] ^= 1
    other_y[rows[0]] = (other_y[rows[0]] + 1) % 4
    other_test[0, 0, 0, 0] ^= 1
    for change in (
        replace(images, train=replace(images.train, x=other_x)),
        replace(images, train=replace(images.train, y=other_y)),
        replace(images, test=replace(images.test, x=other_test)),
    ):
        assert federate(change, plain, THREE, 0).content_hash() != expected
    assert federate(images, plain, THREE, 1).content_hash() != expected
    assert federate(images, plain, THREE, 0).content_hash() == expected


def test_unknown_names_raise(images: Dataset) -> None:
    data = view(images, proxy=ProxyConfig())
    check_refused(r"data\.proxy\.size: must be > 0", data.columns, "one", "proxy", PLAIN)
    for owner, name in (
        ("one", "trian"),
        ("five", "train"),
        ("one", "pooled"),
        ("server", "train"),
    ):
        with pytest.raises(KeyError):
            data.columns(owner, name, PLAIN)


def test_take_keeps_columns_together() -> None:
    x, labels = torch.arange(4.0)[:, None], torch.tensor([0, 1, 2, 0])
    taken = Examples(x, labels, labels + 1, ("a", "b", "c", "d")).select_rows(torch.tensor([3, 1]))
    assert taken.x.flatten().tolist() == [3, 1]
    assert taken.y is not None and taken.y.tolist() == [0, 1]
    assert taken.group is not None and taken.group.tolist() == [1, 2]
    assert Examples(x).select_rows(torch.tensor([0])).y is None


def test_names_are_in_natural_order() -> None:
    assert natural_order({"site_10", "site_2", "a1", "10", "9"}) == [
        "9",
        "10",
        "a1",
        "site_2",
        "site_10",
    ]
    assert natural_order(["a01", "a1"]) == natural_order(["a1", "a01"])
    assert natural_order(["é", "f", "e", "x²", "x3"]) == ["e", "f", "x3", "x²", "é"]


def test_import_reference_imports_or_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [])
    (tmp_path / "mine_for_import.py").write_text("def value(): return 7\n")
    (tmp_path / "broken_for_import.py").write_text("1 / 0\n")
    assert import_reference("python:mine_for_import:value", "data.name", takes="")() == 7
    for reference, words in (
        ("python:mine_for_import", "expected python:package.module:Name"),
        ("python:mine_for_import:valu", "did you mean 'value'?"),
        ("python:no_such_module:x", "module 'no_such_module' not found in the working directory"),
        ("python:broken_for_import:x", "ZeroDivisionError"),
    ):
        refused = refusal(import_reference, reference, "data.name")
        assert refused.startswith("data.name: ") and words in refused
