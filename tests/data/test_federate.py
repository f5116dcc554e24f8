from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetero_fl.config.clients import (
    AugmentConfig,
    ClientSettings,
    Normalize,
    PreprocessConfig,
    ScannerConfig,
)
from hetero_fl.config.source import DataConfig, PartitionConfig, ProxyConfig, SourceConfig, SplitConfig
from hetero_fl.data import (
    Dataset,
    FederatedData,
    Preprocess,
    federate,
    from_arrays,
    load_source,
    make_images,
    make_table,
)
from hetero_fl.errors import UserError
from hetero_fl.task import Task

PLAIN = Preprocess()
PLAIN_CLIENT = ClientSettings()
THREE = {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT, "c": PLAIN_CLIENT}


def numbered(rows: int = 200, groups: list[str] | None = None, **other: Any) -> Dataset:
    """Rows that can be told apart: x is the row's number. The test set's are negative."""
    x, y = torch.arange(float(rows))[:, None], torch.arange(rows) % 4
    return from_arrays(x, y, test=(-1 - x[:40], y[:40]), group=groups, **other)


def rows_of(data: FederatedData, owner: str, name: str) -> list[int]:
    return data.columns(owner, name, PLAIN)["x"].flatten().int().tolist()


def everything(data: FederatedData) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """All columns of everybody, each as its owner sees it."""
    found = {}
    for client in data.client_ids:
        view = data.preprocess(client)
        for name in ("train", "validation", "test", "proxy", "common_test", "common_validation"):
            if name != "proxy" or data.n_proxy:
                found[client, name] = data.columns(client, name, view)
    found["server", "pooled"] = data.columns("server", "pooled", PLAIN)
    return found


def identical(first: FederatedData, second: FederatedData) -> bool:
    a, b = everything(first), everything(second)
    return a.keys() == b.keys() and all(
        a[k].keys() == b[k].keys() and all(torch.equal(a[k][c], b[k][c]) for c in a[k]) for k in a
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "classes", "quantity"]),
    clients=st.integers(1, 6),
    proxy=st.integers(0, 40),
    limit=st.integers(120, 260),
    given_validation=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_training_row_is_in_exactly_one_place(
    kind: str, clients: int, proxy: int, limit: int, given_validation: bool, seed: int
) -> None:
    dataset = numbered(validation=(torch.full((5, 1), 1e4), [0] * 5) if given_validation else None)
    config = DataConfig(
        train_limit=limit, proxy=ProxyConfig(size=proxy), partition=PartitionConfig(kind=kind, classes=4, min_size=6)
    )
    data = federate(dataset, config, {f"c{i}": PLAIN_CLIENT for i in range(clients)}, seed)
    places = [rows_of(data, c, s) for c in data.client_ids for s in ("train", "validation", "test")]
    if proxy:
        places.append(rows_of(data, "", "proxy"))
    if not given_validation:
        places.append(rows_of(data, "", "common_validation"))
    every = sorted(row for place in places for row in place)
    assert len(every) == len(set(every)) == min(limit, 200)
    assert all(place for place in places)
    assert data.n_proxy == proxy and data.n_test == 40
    assert (
        data.n_train == sum(data.n_rows(c, "train") for c in data.client_ids) == len(rows_of(data, "server", "pooled"))
    )
    for client in data.client_ids:
        columns = data.columns(client, "train", PLAIN)
        assert torch.equal(columns["y"], columns["x"].flatten().long() % 4)
        assert data.label_counts(client).tolist() == torch.bincount(columns["y"], minlength=4).tolist()
    assert all(row < 0 for row in rows_of(data, "", "common_test"))


def heterogeneous() -> dict[str, ClientSettings]:
    return {
        "one": ClientSettings(scanner=ScannerConfig(noise=0.1, blur=0.5), preprocess=PreprocessConfig(normalize="own")),
        "two": ClientSettings(preprocess=PreprocessConfig(resize=20, channels=3, normalize=Normalize()), size=3),
        "three": ClientSettings(scanner=ScannerConfig(contrast=0.6, resolution=0.5)),
        "four": PLAIN_CLIENT,
    }


def view(
    images: Dataset, seed: int = 0, clients: dict[str, ClientSettings] | None = None, **other: Any
) -> FederatedData:
    config = DataConfig(partition=PartitionConfig(kind="dirichlet"), **{"proxy": ProxyConfig(size=50), **other})
    return federate(images, config, clients or heterogeneous(), seed)


@pytest.fixture
def images() -> Dataset:
    return make_images(400, 60)


def test_order_of_clients_changes_no_bit(images: Dataset) -> None:
    clients = list(heterogeneous().items())
    first = view(images)
    for seed in range(3):
        random.Random(seed).shuffle(clients)
        other = view(images, clients=dict(clients))
        assert identical(first, other) and first.content_hash() == other.content_hash()
    assert not identical(first, view(images, seed=1))


def test_labels_of_the_proxy_set_are_never_read(images: Dataset) -> None:
    plain = view(images)
    held = plain._public["proxy"].rows
    assert images.train.y is not None
    scrambled = images.train.y.clone()
    scrambled[held] = (scrambled[held] + 1 + torch.arange(len(held)) % 3) % 4
    assert (scrambled[held] != images.train.y[held]).all()
    other = view(replace(images, train=replace(images.train, y=scrambled)))
    assert identical(plain, other) and plain.content_hash() == other.content_hash()
    assert set(plain.columns("one", "proxy", PLAIN)) == {"x"}
    assert plain._public["proxy"].examples.y is None
    scrambled[plain._private["one"]["train"].rows[0]] += 1  # the comparison would notice a label that is read
    scrambled %= 4
    third = view(replace(images, train=replace(images.train, y=scrambled)))
    assert not identical(plain, third) and plain.content_hash() != third.content_hash()


def test_labels_of_another_proxy_set_are_never_read(images: Dataset, npz: Any) -> None:
    source = SourceConfig(name="npz", path=str(npz()))
    clients = {
        "a": ClientSettings(preprocess=PreprocessConfig(resize=16)),
        "b": ClientSettings(preprocess=PreprocessConfig(resize=16)),
    }
    plain = view(images, clients=clients, proxy=ProxyConfig(source=source))
    npz(train_labels=np.array([None] * 30))
    other = view(images, clients=clients, proxy=ProxyConfig(source=source))
    assert plain.n_proxy == 30 and plain.columns("a", "proxy", PLAIN)["x"].shape == (30, 1, 8, 8)
    assert identical(plain, other) and plain.content_hash() == other.content_hash()
    assert plain.n_train > 200  # nothing is held out of the training data
    assert view(images, clients=clients, proxy=ProxyConfig(source=source, size=12)).n_proxy == 12
    with pytest.raises(
        UserError, match=r"^data\.proxy\.source: examples of npz have shape \(1, 8, 8\), .* client 'four'"
    ):
        view(images, proxy=ProxyConfig(source=source))


def test_proxy_of_a_registered_source_and_of_a_table(images: Dataset, tmp_path: Path) -> None:
    clients = {n: ClientSettings(preprocess=PreprocessConfig(resize=16, channels=1)) for n in "ab"}
    assert view(images, clients=clients, proxy=ProxyConfig(source=SourceConfig(name="digits"), size=99)).n_proxy == 99
    table = make_table(200, 40)
    frame = pd.DataFrame(table.train.x[:30].numpy(), columns=list(table.columns)).iloc[:, ::-1].assign(extra=1.0)
    frame.to_csv(tmp_path / "p.csv", index=False)
    config = DataConfig(proxy=ProxyConfig(source=SourceConfig(name="table", path=str(tmp_path / "p.csv"))))
    found = federate(table, config, THREE, 0).columns("", "proxy", PLAIN)["x"]
    assert torch.allclose(found, table.train.x[:30])
    frame.drop(columns="x3").to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(UserError, match="has no column 'x3'"):
        federate(table, config, THREE, 0)


def test_scanner_touches_private_rows_once_and_public_ones_never(images: Dataset) -> None:
    dark = ClientSettings(scanner=ScannerConfig(brightness=-1.0))
    data = view(images, clients={"a": dark, "b": PLAIN_CLIENT})
    for split in ("train", "validation", "test"):
        assert data.columns("a", split, PLAIN)["x"].max() == 0
        assert data.columns("b", split, PLAIN)["x"].mean() > 0.3
    for name in ("proxy", "common_test", "common_validation"):
        assert data.columns("a", name, PLAIN)["x"].mean() > 0.3
    pooled = data.columns("server", "pooled", PLAIN)["x"]
    assert pooled[: data.n_rows("a", "train")].max() == 0 and pooled[data.n_rows("a", "train") :].mean() > 0.3
    half = ClientSettings(scanner=ScannerConfig(contrast=0.5))
    once = view(images, clients={"a": half, "b": PLAIN_CLIENT})
    x, plain = (
        d.columns("a", "train", PLAIN)["x"]
        for d in (once, view(images, clients={"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}))
    )
    assert torch.allclose(x - 0.5, 0.5 * (plain - 0.5), atol=2 / 255)


def test_own_statistics_are_those_of_the_scanned_training_rows(images: Dataset) -> None:
    data = view(images)
    seen = data.columns("one", "train", data.preprocess("one"))["x"]
    assert abs(seen.mean()) < 1e-5 and abs(seen.std(correction=0) - 1) < 1e-5
    assert data.columns("two", "common_test", data.preprocess("two"))["x"].shape == (60, 3, 20, 20)
    assert data.preprocess("four") == PLAIN and data.input_shape == (1, 16, 16)
    server = data.server_preprocess(PreprocessConfig(normalize="own"))
    assert abs(data.columns("", "proxy", server)["x"].mean()) < 1e-5


def test_limits_are_kept_and_test_rows_are_alike_for_all_seeds() -> None:
    config = DataConfig(train_limit=100, test_limit=15, proxy=ProxyConfig(size=20))
    first, second = (federate(numbered(), config, THREE, seed) for seed in (0, 1))
    assert first.n_test == 15 and rows_of(first, "", "common_test") == rows_of(second, "", "common_test")
    assert rows_of(first, "", "proxy") != rows_of(second, "", "proxy")
    total = sum(first.n_rows(c, s) for c in "abc" for s in ("train", "validation", "test"))
    assert total + 20 + len(rows_of(first, "", "common_validation")) == 100
    carved = federate(replace(numbered(), test=None), DataConfig(), THREE, 0)
    assert carved.n_test == 40 and rows_of(carved, "", "common_test") == rows_of(
        federate(replace(numbered(), test=None), DataConfig(), THREE, 1), "", "common_test"
    )


def test_sizes_and_fractions() -> None:
    clients = {"a": ClientSettings(size=1), "b": ClientSettings(size=3)}
    config = DataConfig(split=SplitConfig(validation=0.1, test=0.2), validation=0.2)
    data = federate(numbered(), config, clients, 0)
    assert [[data.n_rows(c, s) for s in ("train", "validation", "test")] for c in "ab"] == [[28, 4, 8], [84, 12, 24]]
    none = federate(numbered(), DataConfig(split=SplitConfig(validation=0, test=0)), clients, 0)
    assert none.columns("a", "test", PLAIN)["x"].shape == (0, 1) and none.n_rows("a", "validation") == 0


def test_natural_groups_go_to_clients_of_their_name() -> None:
    groups = [("c", "a", "b")[i % 3] for i in range(200)]
    config = DataConfig(partition=PartitionConfig(kind="natural"))
    data = federate(numbered(groups=groups), config, THREE, 0)
    for i, client in enumerate("cab"):
        assert all(row % 3 == i for s in ("train", "validation", "test") for row in rows_of(data, client, s))
    other = federate(
        numbered(groups=groups), config, {"site_2": PLAIN_CLIENT, "site_10": PLAIN_CLIENT, "x": PLAIN_CLIENT}, 0
    )
    assert all(row % 3 == 1 for row in rows_of(other, "site_2", "train"))  # else in the order in which people count


def test_own_sources(npz: Any, tmp_path: Path) -> None:
    common = from_arrays(
        torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8),
        torch.arange(200) % 2,
        test=(torch.zeros(9, 1, 8, 8).byte(), [0, 1] * 4 + [0]),
    )
    path = npz()
    own = ClientSettings(data=SourceConfig(name="npz", path=str(path)))
    data = federate(
        common,
        DataConfig(partition=PartitionConfig(min_size=10)),
        {"a": PLAIN_CLIENT, "own": own, "b": PLAIN_CLIENT},
        0,
    )
    mine = torch.cat([data.columns("own", s, PLAIN)["x"] for s in ("train", "validation", "test")])
    with np.load(path) as arrays:
        expected = {image.tobytes() for image in arrays["train_images"]}
    assert {image.tobytes() for image in (mine * 255).round().byte().numpy()} == expected and len(mine) == 30
    shared = federate(common, DataConfig(partition=PartitionConfig(min_size=10)), {"a": own, "b": own}, 0)
    assert sum(shared.n_rows(c, s) for c in "ab" for s in ("train", "validation", "test")) == 30
    assert shared.n_test == 9


def test_own_source_is_checked_against_the_common_one(npz: Any, images: Dataset, tmp_path: Path) -> None:
    xray = load_source(SourceConfig(), tmp_path)
    few = DataConfig(partition=PartitionConfig(min_size=5), root=str(tmp_path))

    def own(common: Dataset, source: SourceConfig, **other: Any) -> FederatedData:
        config = few.model_copy(update={"name": common.name})
        return federate(
            common, config, {"a": PLAIN_CLIENT, "own": ClientSettings(data=source, **other), "b": PLAIN_CLIENT}, 0
        )

    local = SourceConfig(name="npz", path=str(npz()))
    for common, source, words in (
        (
            xray,
            local,
            "'own': data: examples of npz have shape (1, 8, 8), those of the common set chest_xray (1, 28, 28)",
        ),
        (xray, SourceConfig(name="digits"), "'own': data: digits has 10 classes, the common set chest_xray has 2"),
        (images, SourceConfig(), "'own': data: chest_xray has 2 classes, the common set synthetic_images has 4"),
        (xray, SourceConfig(), "'own': data: found the common source"),
        (
            make_table(kind="regression"),
            local,
            "'own': data: npz is multiclass, the common set synthetic_table has a regression",
        ),
        (xray, SourceConfig(name="digit"), "'own': data.name: found 'digit'; did you mean 'digits'?"),
        (xray, SourceConfig(name="npz", path="none.npz"), "'own': data.path: none.npz: no such file"),
    ):
        with pytest.raises(UserError) as refused:
            own(common, source)
        assert words in str(refused.value)
    assert own(xray, local, preprocess=PreprocessConfig(resize=28)).client_ids == ["a", "b", "own"]


def test_own_classes_and_columns_are_matched_by_name(tmp_path: Path) -> None:
    rows = pd.DataFrame({"u": range(90), "v": [-i for i in range(90)], "kind": ["x", "y", "z"] * 30})
    rows.to_csv(tmp_path / "all.csv", index=False)
    rows.loc[rows.kind != "x", ["kind", "v", "u"]].to_csv(tmp_path / "own.csv", index=False)
    common = load_source(SourceConfig(name="table", path=str(tmp_path / "all.csv"), label="kind"), tmp_path)
    own = SourceConfig(name="table", path=str(tmp_path / "own.csv"), label="kind")
    clients = {"own": ClientSettings(data=own), "rest": PLAIN_CLIENT}
    columns = federate(common, DataConfig(), clients, 0).columns("own", "train", PLAIN)
    assert torch.equal(columns["x"][:, 0], -columns["x"][:, 1]) and columns["x"][:, 0].min() > 0
    assert torch.equal(columns["y"], columns["x"][:, 0].long() % 3)
    for change, words in (
        (rows.rename(columns={"u": "w"}), "has no column 'u', the common set table has"),
        (rows.assign(w=1), "has column 'w', the common set table has none of that name"),
        (rows.replace({"kind": {"y": "yy"}}), "has class 'yy', the common set table has none of that name"),
    ):
        change.to_csv(tmp_path / "own.csv", index=False)
        with pytest.raises(UserError) as refused:
            federate(common, DataConfig(), clients, 0)
        assert str(refused.value).startswith("clients: 'own': data: table ") and words in str(refused.value)


def test_settings_that_do_not_fit_the_examples(images: Dataset) -> None:
    for settings_, words in (
        (ClientSettings(scanner=ScannerConfig(blur=1)), "clients: 'a': scanner: is for images"),
        (ClientSettings(augment=AugmentConfig(flip=True)), "clients: 'a': augment: is for images"),
        (ClientSettings(preprocess=PreprocessConfig(resize=8)), "clients: 'a': preprocess.resize: is for images"),
    ):
        with pytest.raises(UserError, match=words):
            federate(make_table(), DataConfig(), {**THREE, "a": settings_}, 0)
    with pytest.raises(UserError, match=r"augment\.crop: found 16; images have 16 pixels"):
        federate(images, DataConfig(), {"a": ClientSettings(augment=AugmentConfig(crop=16))}, 0)


def test_too_few_rows() -> None:
    with pytest.raises(UserError, match=r"data\.proxy\.size: found 100000000, but arrays has 200 training rows"):
        federate(numbered(), DataConfig(proxy=ProxyConfig(size=10**8)), THREE, 0)
    with pytest.raises(UserError, match=r"data\.partition\.min_size: found 20, .* 9 training rows"):
        federate(numbered(), DataConfig(train_limit=10), THREE, 0)
    one = DataConfig(partition=PartitionConfig(kind="quantity", alpha=1e-6, min_size=1))
    with pytest.raises(UserError, match=r"data\.partition\.min_size: found 1, and client '[abc]' has 1 rows"):
        federate(numbered(), one, THREE, 0)
    bare = one.model_copy(update={"split": SplitConfig(validation=0, test=0)})
    with pytest.raises(UserError, match="has 1 rows"):  # even then: nothing can be learned from one
        federate(numbered(), bare, THREE, 0)


def test_multilabel_and_regression() -> None:
    for kind in ("multilabel", "regression"):
        data = federate(make_table(kind=kind), DataConfig(partition=PartitionConfig(kind="dirichlet")), THREE, 0)
        columns = data.columns("a", "train", PLAIN)
        assert columns["y"].dtype == torch.float32 and columns["y"].shape == (data.n_rows("a", "train"), 3)
        expected = columns["y"].sum(0).tolist() if kind == "multilabel" else [data.n_rows("a", "train")] * 3
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
    assert small._private_columns.bytes <= limit or len(small._private_columns) == 1
    assert small._private_columns.bytes < sum(small.n_rows(c, "train") for c in small.client_ids) * 1024 and largest > 0
    assert torch.equal(small.columns("one", "train", PLAIN)["x"], first)  # made again, alike, noise included
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
    assert all(s.examples.x is images.train.x for parts in data._private.values() for s in parts.values())


def test_hash_sees_every_image_and_label(images: Dataset) -> None:
    plain = DataConfig(proxy=ProxyConfig(size=50))
    expected = federate(images, plain, THREE, 0).content_hash()
    assert images.train.y is not None and images.test is not None
    rows = federate(images, plain, THREE, 0)._private["b"]["validation"].rows
    other_x, other_y, other_test = images.train.x.clone(), images.train.y.clone(), images.test.x.clone()
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


def test_names_that_are_none(images: Dataset) -> None:
    data = view(images, proxy=ProxyConfig())
    with pytest.raises(UserError, match=r"data\.proxy\.size: found 0"):
        data.columns("one", "proxy", PLAIN)
    for owner, name in (("one", "trian"), ("five", "train"), ("one", "pooled"), ("server", "train")):
        with pytest.raises(KeyError):
            data.columns(owner, name, PLAIN)


def test_pooling_needs_one_shape(images: Dataset, npz: Any) -> None:
    own = ClientSettings(data=SourceConfig(name="npz", path=str(npz())), preprocess=PreprocessConfig(resize=16))
    data = federate(images, DataConfig(partition=PartitionConfig(min_size=5)), {"a": PLAIN_CLIENT, "own": own}, 0)
    with pytest.raises(UserError, match=r"server\.preprocess: examples differ in shape"):
        data.columns("server", "pooled", PLAIN)
    assert data.columns("server", "pooled", Preprocess(resize=16))["x"].shape == (data.n_train, 1, 16, 16)
