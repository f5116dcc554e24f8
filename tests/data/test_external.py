"""Data sources of single clients and external proxy sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hetero_fl.config.clients import ClientSettings, PreprocessConfig
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig, SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data import (
    Dataset,
    FederatedData,
    Preprocess,
    federate,
    from_arrays,
    load_source,
    make_table,
    partition_rows,
)
from hetero_fl.data.sources.text import read_vocabulary
from hetero_fl.experiment import prepare
from tests.support.benchmark_folders import write_client_folder
from tests.support.federated_data import PLAIN, PLAIN_CLIENT, THREE, identical, view
from tests.support.image_folders import make_image_folder
from tests.support.mistakes import check_refused, refusal


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
    holed = SourceConfig(
        name="npz", path=str(npz("holed.npz", train_images=np.full((30, 8, 8), np.nan)))
    )
    check_refused(
        r"^data\.proxy\.source\.path: .*holed.npz: train_images: row 0: NaN or infinite value",
        view,
        images,
        clients=clients,
        proxy=ProxyConfig(source=holed),
    )
    check_refused(
        r"^data\.proxy\.source: expected examples of shape \(1, "
        r"16, 16\) .* client 'four', got \(1, 8, 8\)",
        view,
        images,
        proxy=ProxyConfig(source=source),
    )


def test_labels_of_another_proxy_set_are_matched_to_the_common_classes(tmp_path: Path) -> None:
    common, other = tmp_path / "common.csv", tmp_path / "public.csv"
    pd.DataFrame({"a": range(40), "kind": ["cat", "dog"] * 20}).to_csv(common, index=False)
    pd.DataFrame({"a": range(6), "kind": ["dog", "dog", "dog", "cat", "dog", "dog"]}).to_csv(
        other, index=False
    )
    source = SourceConfig(name="table", path=str(other), label="kind")
    dataset = load_source(SourceConfig(name="table", path=str(common), label="kind"), tmp_path)
    config = DataConfig(
        proxy=ProxyConfig(source=source, labels=True),
        partition=PartitionConfig(kind="iid", min_size=2),
    )

    data = federate(replace(dataset, test=dataset.train), config, {"a": ClientSettings()}, 0)

    assert data.has_proxy_labels
    assert data.columns("a", "proxy", data.preprocess("a"))["y"].tolist() == [1, 1, 1, 0, 1, 1]


def test_unlabeled_proxy_set_is_refused_if_labels_are_needed(images: Dataset, npz: Any) -> None:
    path = npz("unlabeled.npz", train_labels=None)
    clients = {"a": ClientSettings(preprocess=PreprocessConfig(resize=16))}
    proxy = ProxyConfig(source=SourceConfig(name="npz", path=str(path)), labels=True)

    check_refused(
        r"^data\.proxy\.labels=true needs matching labels: .*array 'train_labels' not found",
        view,
        images,
        clients=clients,
        proxy=proxy,
    )


def test_proxy_of_a_registered_source_and_of_a_table(images: Dataset, tmp_path: Path) -> None:
    clients = {n: ClientSettings(preprocess=PreprocessConfig(resize=16, channels=1)) for n in "ab"}
    assert (
        view(
            images, clients=clients, proxy=ProxyConfig(source=SourceConfig(name="digits"), size=99)
        ).n_proxy
        == 99
    )
    table = make_table(200, 40)
    frame = (
        pd.DataFrame(table.train.x[:30].numpy(), columns=list(table.columns))
        .iloc[:, ::-1]
        .assign(extra=1.0)
    )
    frame.to_csv(tmp_path / "p.csv", index=False)
    config = DataConfig(
        proxy=ProxyConfig(source=SourceConfig(name="table", path=str(tmp_path / "p.csv")))
    )
    found = federate(table, config, THREE, 0).columns("", "proxy", PLAIN)["x"]
    assert torch.allclose(found, table.train.x[:30])
    frame.drop(columns="x3").to_csv(tmp_path / "p.csv", index=False)
    check_refused(
        r"column 'x3' not found, .* contains; choose from extra", federate, table, config, THREE, 0
    )


def test_client_source_keeps_its_local_test_rows(tmp_path: Path) -> None:
    write_client_folder(tmp_path / "common")
    own = write_client_folder(tmp_path / "own", clients=1, rows=30)
    common = load_source(SourceConfig(name="htfllib", path=str(tmp_path / "common")), tmp_path)
    source = SourceConfig(name="htfllib", path=str(own))
    config = DataConfig(partition=PartitionConfig(kind="iid", min_size=2))

    data = federate(common, config, {"a": ClientSettings(), "b": ClientSettings(data=source)}, 0)

    test = load_source(source, tmp_path).local_sets["test"]
    kept = data.client_rows["b"]["test"].copy_rows()
    assert torch.equal(kept.x, test.x) and torch.equal(kept.labels, test.labels)
    # The other sets are held out of the training rows.
    assert data.n_rows("b", "train") + data.n_rows("b", "validation") == 30
    assert data.n_rows("b", "validation") > 0


def test_client_sources_are_loaded(npz: Any, tmp_path: Path) -> None:
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
    client_rows = torch.cat(
        [data.columns("own", s, PLAIN)["x"] for s in ("train", "validation", "test")]
    )
    with np.load(path) as arrays:
        expected = {image.tobytes() for image in arrays["train_images"]}
    assert {
        image.tobytes() for image in (client_rows * 255).round().byte().numpy()
    } == expected and len(client_rows) == 30
    shared = federate(
        common, DataConfig(partition=PartitionConfig(min_size=10)), {"a": own, "b": own}, 0
    )
    assert sum(shared.n_rows(c, s) for c in "ab" for s in ("train", "validation", "test")) == 30
    assert shared.n_test == 9 and not shared.simulated
    four = replace(common, task=Task("multiclass", 4))
    generated = ClientSettings(
        data=SourceConfig(name="synthetic_images"), preprocess=PreprocessConfig(resize=8)
    )
    assert federate(four, DataConfig(), {"a": PLAIN_CLIENT, "own": generated}, 0).simulated


def test_label_is_inherited_by_files_next_to_a_common_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": range(60), "ill": [0, 1] * 30})
    frame.to_csv(tmp_path / "common.csv", index=False)
    frame.to_csv(tmp_path / "own.csv", index=False)
    common = DataConfig(name="table", path=str(tmp_path / "common.csv"), label="ill")

    def client(**keys: Any) -> ClientSettings:
        return ClientSettings(data=SourceConfig(path=str(tmp_path / "own.csv"), **keys))

    inherited, written = (
        federate(
            load_source(common, tmp_path), common, {"a": PLAIN_CLIENT, "own": client(**keys)}, 0
        )
        for keys in ({"name": "table"}, {"name": "table", "label": "ill"})
    )

    assert inherited.content_hash() == written.content_hash()


def test_client_sources_are_split_with_different_draws(
    npz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # draws are keyed by the path as written
    x, y = torch.zeros(200, 1, 8, 8).byte(), torch.arange(200) % 2
    common = from_arrays(x, y, validation=(x[:9], y[:9]), test=(x[:9], y[:9]))
    clients = {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT}
    for file in ("north", "south"):
        npz(f"{file}.npz", train_images=x[:, 0].numpy(), train_labels=y[:, None].numpy())
        own = ClientSettings(data=SourceConfig(name="npz", path=f"{file}.npz"))
        clients |= {f"{file}_1": own, f"{file}_2": own}
    config = DataConfig(partition=PartitionConfig(kind="dirichlet", min_size=10))
    data = federate(common, config, clients, 0)
    rows = {c: sum(data.n_rows(c, s) for s in ("train", "validation", "test")) for c in clients}
    assert rows["north_1"] + rows["north_2"] == rows["south_1"] + rows["south_2"] == 200
    assert len({rows["a"], rows["north_1"], rows["south_1"]}) == 3
    # the common source is dealt by the seed itself
    parts = partition_rows(y, None, config.partition, [1, 1], common.task, seed=0)
    assert [rows["a"], rows["b"]] == [len(part) for part in parts]


def test_external_proxy_must_fit_the_server(images: Dataset, npz: Any) -> None:
    clients = {n: ClientSettings(preprocess=PreprocessConfig(resize=16)) for n in "ab"}
    config = DataConfig(proxy=ProxyConfig(source=SourceConfig(name="npz", path=str(npz()))))
    check_refused(
        r"after preprocessing for the server, .*; set server\.preprocess\.resize or channels",
        federate,
        images,
        config,
        clients,
        0,
        server=PreprocessConfig(),
    )
    assert federate(images, config, clients, 0, server=PreprocessConfig(resize=16)).n_proxy == 30
    assert federate(images, config, clients, 0).n_proxy == 30


def test_client_source_must_match_common_source(npz: Any, images: Dataset, tmp_path: Path) -> None:
    xray = load_source(SourceConfig(), tmp_path)
    few = DataConfig(partition=PartitionConfig(min_size=5), root=str(tmp_path))

    def own(common: Dataset, source: SourceConfig, **other: Any) -> FederatedData:
        config = few.model_copy(update={"name": common.name})
        return federate(
            common,
            config,
            {"a": PLAIN_CLIENT, "own": ClientSettings(data=source, **other), "b": PLAIN_CLIENT},
            0,
        )

    local = SourceConfig(name="npz", path=str(npz()))
    for common, source, words in (
        (
            xray,
            local,
            (
                "'own': data: expected examples of shape (1, 28, 28) as in the main data set "
                "after preprocessing for client 'own', got (1, 8, 8)"
            ),
        ),
        (
            xray,
            SourceConfig(name="digits"),
            "'own': data: digits: '2' is unknown to the main data set; choose from 0, 1",
        ),
        (
            images,
            SourceConfig(),
            "'own': data: chest_xray: 'normal' is unknown to the main data set; choose from 0, 1",
        ),
        (xray, SourceConfig(), "'own': data: is the source of the main data set"),
        (
            make_table(kind="regression"),
            local,
            ("'own': data: npz: expected 3 targets as in the main data set, got 1"),
        ),
        (
            xray,
            SourceConfig(name="digit"),
            "'own': data.name: unknown source 'digit'; did you mean 'digits'?",
        ),
        (
            xray,
            SourceConfig(name="npz", path="none.npz"),
            "'own': data.path: file 'none.npz' not found",
        ),
    ):
        assert words in refusal(own, common, source)
    assert own(xray, local, preprocess=PreprocessConfig(resize=28)).client_ids == ["a", "b", "own"]


def test_client_classes_and_columns_are_matched_by_name(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {"u": range(90), "v": [-i for i in range(90)], "kind": ["x", "y", "z"] * 30}
    )
    rows.to_csv(tmp_path / "all.csv", index=False)
    rows.loc[rows.kind != "x", ["kind", "v", "u"]].to_csv(tmp_path / "own.csv", index=False)
    common = load_source(
        SourceConfig(name="table", path=str(tmp_path / "all.csv"), label="kind"), tmp_path
    )
    own = SourceConfig(name="table", path=str(tmp_path / "own.csv"), label="kind")
    clients = {"own": ClientSettings(data=own), "rest": PLAIN_CLIENT}
    columns = federate(common, DataConfig(), clients, 0).columns("own", "train", PLAIN)
    assert torch.equal(columns["x"][:, 0], -columns["x"][:, 1]) and columns["x"][:, 0].min() > 0
    assert torch.equal(columns["y"], columns["x"][:, 0].long() % 3)
    for change, words in (
        (rows.drop(columns="u"), "column 'u' not found, which the main data set contains"),
        (rows.assign(w=1), "column 'w' does not exist in the main data set"),
        (
            rows.replace({"kind": {"y": "yy"}}),
            "'yy' is unknown to the main data set",
        ),
    ):
        change.to_csv(tmp_path / "own.csv", index=False)
        refused = refusal(federate, common, DataConfig(), clients, 0)
        assert refused.startswith("clients: 'own': data: table: ") and words in refused


def test_pooling_requires_equal_shapes(images: Dataset, npz: Any) -> None:
    own = ClientSettings(
        data=SourceConfig(name="npz", path=str(npz())), preprocess=PreprocessConfig(resize=16)
    )
    data = federate(
        images,
        DataConfig(partition=PartitionConfig(min_size=5)),
        {"a": PLAIN_CLIENT, "own": own},
        0,
    )
    check_refused(
        r"clients: 'a': preprocess: .* pooled and must have one shape",
        data.columns,
        "server",
        "pooled",
        PLAIN,
    )
    check_refused(
        r"^server\.preprocess: .* must have one shape",
        data.columns,
        "server",
        "pooled",
        Preprocess(channels=3),
    )
    assert data.columns("server", "pooled", Preprocess(resize=16))["x"].shape == (
        data.n_train,
        1,
        16,
        16,
    )


CLIENTS = {"count": 2, "defaults": {"model": "linear"}}


def proxy_of(name: str, source: str, path: Path) -> np.ndarray:
    data = {"name": name, "proxy": {"source": {"name": source, "path": str(path)}}}
    run = prepare({"data": data, "clients": CLIENTS, "algorithm": {"name": "fedmd"}})
    return run.federation.data.public_sets["proxy"].examples.x.numpy()  # type: ignore[no-any-return]


def test_unlabeled_npz_files_of_any_spelling_are_a_proxy_set(tmp_path: Path) -> None:
    windows = np.random.default_rng(0).normal(size=(30, 64, 6)).astype(np.float32)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for name in ("public.npz", "PUBLIC.NPZ"):
        with (tmp_path / name).open("wb") as file:
            np.savez(file, x=windows, train_images=images)
        assert np.array_equal(proxy_of("activity", "activity", tmp_path / name), windows)
        assert proxy_of("digits", "npz", tmp_path / name).shape == (30, 1, 8, 8)


def test_vocabulary_reads_all_words_of_a_text_with_tabs(tmp_path: Path) -> None:
    public = tmp_path / "public.txt"
    public.write_text("spam\tgood\tbad\n" * 2)
    for predict, words in (("class", {"good", "bad"}), ("next", {"good", "bad", "spam"})):
        vocabulary = read_vocabulary(TextConfig(public=str(public), predict=predict))
        assert set(vocabulary.words) == words


def own_and_proxy(folder: Path, main: dict[str, Any], **files: dict[str, Any]) -> FederatedData:
    """Federate a main data set, a client with a file of its own, and a proxy set."""
    own, proxy = ({"name": main["name"], **files[part]} for part in ("own", "proxy"))
    gaps = {} if main["name"] == "image_folder" else {"preprocess": {"missing": "indicate"}}
    config = {
        "data": {**main, "proxy": {"source": proxy}, "partition": {"min_size": 2}},
        "clients": {
            "defaults": {"model": "mlp", **gaps},
            "groups": [{"name": "common"}, {"name": "own", "data": own}],
        },
        "algorithm": {"name": "fedmd"},
    }
    return prepare(config).federation.data


def rows_of(data: FederatedData) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the client with a file of its own and of the proxy set."""
    splits = data.client_rows["own"].values()
    x = torch.cat([torch.as_tensor(part.copy_rows().x) for part in splits])
    return x.numpy(), data.public_sets["proxy"].examples.x.numpy()


def test_files_inherit_the_marks_of_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": np.arange(60) + 0.5, "y": np.resize(["p", "q"], 60)})
    for name in ("main", "own", "proxy"):
        frame.to_csv(tmp_path / f"{name}.csv", sep=";", decimal=",", index=False)
    frame.to_parquet(tmp_path / "own.parquet")
    paths = {name: {"path": str(tmp_path / f"{name}.csv")} for name in ("main", "own", "proxy")}
    main = {"name": "table", "label": "y", "read": {"decimal": ","}, **paths["main"]}

    for own in (paths["own"], {"path": str(tmp_path / "own.parquet")}):
        x, proxy = rows_of(own_and_proxy(tmp_path, main, own=own, proxy=paths["proxy"]))

        assert sorted(x[:, 0]) == sorted(proxy[:, 0]) == frame["a"].tolist()
    files = [{"name": n, "data": {"name": "table", **paths[n]}} for n in ("own", "proxy")]
    pooled = prepare(
        {
            "data": {key: value for key, value in main.items() if key != "path"},
            "clients": {"defaults": {"model": "mlp"}, "groups": files},
            "algorithm": {"name": "local"},
        }
    )
    assert pooled.federation.data.n_train > 0


def test_series_of_clients_are_read_as_the_main_series(tmp_path: Path) -> None:
    hours = pd.date_range("2024-01-01", periods=900, freq="h")
    counts = np.arange(900) % 24 + 1.0

    def save(name: str, site: str) -> dict[str, Any]:
        table = {"DateTime": hours.strftime("%d.%m.%Y %H:%M"), "Vehicles": counts, "Junction": site}
        pd.DataFrame(table).to_csv(tmp_path / name, index=False)
        return {"path": str(tmp_path / name)}

    series = {"window": 12, "format": "%d.%m.%Y %H:%M", "sites": ["north"], "level": "week"}
    np.savez(tmp_path / "own.npz", DateTime=hours.to_numpy("datetime64[h]"), Vehicles=counts)
    main = {"name": "traffic", "series": series, **save("main.csv", "north")}

    for own in (save("own.csv", "south"), {"path": str(tmp_path / "own.npz")}):
        found = own_and_proxy(tmp_path, main, own=own, proxy=save("proxy.csv", "west"))

        x, proxy = rows_of(found)
        assert x.shape[1:] == proxy.shape[1:] == (12, 13) and len(proxy) > 100


def test_recordings_of_clients_are_cut_as_the_main_recordings(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    frame = pd.DataFrame(draws.normal(size=(800, 2)), columns=["ax", "ay"])
    frame["activity"] = np.repeat(["sit", "walk"] * 4, 100)
    frame.to_csv(tmp_path / "main.csv", index=False)
    frame.to_csv(tmp_path / "own.csv", index=False)
    windows = draws.normal(size=(30, 20, 2))
    np.savez(tmp_path / "proxy.npz", x=windows, columns=["ax", "ay"])
    main = {"name": "activity", "path": str(tmp_path / "main.csv"), "windows": {"length": 20}}

    own, proxy = ({"path": str(tmp_path / name)} for name in ("own.csv", "proxy.npz"))
    x, public = rows_of(own_and_proxy(tmp_path, main, own=own, proxy=proxy))

    assert x.shape == (40, 20, 2) and np.array_equal(public, windows.astype(np.float32))


def test_folders_of_clients_have_the_main_size(tmp_path: Path) -> None:
    for name, side in (("main", 8), ("own", 12), ("proxy", 10)):
        make_image_folder(tmp_path / name, 60, side)
    paths = {name: {"path": str(tmp_path / name)} for name in ("main", "own", "proxy")}
    main = {"name": "image_folder", "size": 8, **paths["main"]}

    x, proxy = rows_of(own_and_proxy(tmp_path, main, own=paths["own"], proxy=paths["proxy"]))

    assert x.shape[1:] == proxy.shape[1:] == (3, 8, 8)


def test_labels_of_a_proxy_file_have_the_main_label_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": range(90), "kind": ["cat", "dog"] * 45})
    for name in ("main.csv", "proxy.csv"):
        frame.to_csv(tmp_path / name, index=False)
    data = {"name": "table", "path": str(tmp_path / "main.csv"), "label": "kind"}
    proxy = {"source": {"name": "table", "path": str(tmp_path / "proxy.csv")}, "labels": True}
    algorithm = {"name": "fedmd", "initial_phase": True}

    found = prepare({"data": {**data, "proxy": proxy}, "clients": CLIENTS, "algorithm": algorithm})

    assert found.federation.data.has_proxy_labels
