"""The download code, against a server on this machine that stands in for the real ones."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torchvision

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.sources import speech
from hetero_fl.data.sources.movies import movielens as movies
from tests.support.cases import each_case
from tests.support.file_server import md5, publish
from tests.support.mistakes import check_refused, refusal
from tests.support.movielens_folders import write_movielens_folder
from tests.support.speech_folders import write_speech_folder

ROWS = {"train": 30, "val": 6, "test": 9}
"""Rows of each split of the fixture `npz`."""


@pytest.fixture(scope="module", autouse=True)
def medmnist() -> ModuleType:
    """Import the package, which takes long, when the first test needs it."""
    module: ModuleType = pytest.importorskip("medmnist")
    return module


def get(name: str, root: Path, **keys: Any) -> Dataset:
    return load_source(SourceConfig(name=name, **keys), root)


@pytest.fixture
def serve_medmnist(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, medmnist: ModuleType
) -> Callable[..., Path]:
    """Return a function that serves a file of MedMNIST in place of the published one."""
    address, folder = server

    def publish_file(path: Path, name: str, suffix: str = "") -> Path:
        file = folder / f"{name}{suffix}.npz"
        file.write_bytes(path.read_bytes())
        monkeypatch.setitem(medmnist.INFO[name], f"url{suffix}", address + file.name)
        monkeypatch.setitem(medmnist.INFO[name], f"MD5{suffix}", md5(file.read_bytes()))
        return file

    return publish_file


def test_mnist_is_loaded_from_download(
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    address, folder = server
    rng = np.random.default_rng(0)
    resources, arrays = [], {}
    for part, rows in (("train", 12), ("t10k", 5)):
        images, labels = (
            rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8),
            np.arange(rows, dtype=np.uint8) % 10,
        )
        arrays[part] = images, labels
        for name, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], dtype=">i4").tobytes()
            data = gzip.compress(header + array.tobytes())
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(data)
            resources.append((f"{part}-{name}-ubyte.gz", md5(data)))
    for name, cls in (
        ("mnist", torchvision.datasets.MNIST),
        ("fashion_mnist", torchvision.datasets.FashionMNIST),
    ):
        monkeypatch.setattr(cls, "mirrors", [address])
        monkeypatch.setattr(cls, "resources", resources)
        dataset = get(name, tmp_path / "root")
        assert np.array_equal(dataset.train.x[:, 0].numpy(), arrays["train"][0])
        assert (
            dataset.test is not None and dataset.test.y is not None and dataset.validation is None
        )
        assert dataset.test.y.tolist() == arrays["t10k"][1].tolist()
        assert dataset.name == name and dataset.task.outputs == 10
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
    assert len(get("mnist", tmp_path / "root").train) == 12  # kept from the first time
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "labels"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_loaded_from_download(
    name: str,
    labels: str,
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, folder = server
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    rng = np.random.default_rng(0)
    files: dict[str, Any] = {
        n: {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), labels: [0, 1, 2, 9]}
        for n in ("a", "b")
    }
    # the format of the published files
    packed = {n: pickle.dumps(content) for n, content in files.items()}
    packed["meta"] = pickle.dumps({cls.meta["key"]: list("abc")})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, data in packed.items():
            entry = tarfile.TarInfo(f"{cls.base_folder}/{file}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    (folder / cls.filename).write_bytes(buffer.getvalue())
    monkeypatch.setattr(cls, "url", address + cls.filename)
    monkeypatch.setattr(cls, "tgz_md5", md5(buffer.getvalue()))
    monkeypatch.setattr(cls, "train_list", [["a", md5(packed["a"])]])
    monkeypatch.setattr(cls, "test_list", [["b", md5(packed["b"])]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "filename": "meta", "md5": md5(packed["meta"])})
    dataset = get(name, tmp_path / "root")
    assert np.array_equal(dataset.train.x.numpy(), files["a"]["data"].reshape(4, 3, 32, 32))
    assert dataset.train.y is not None and dataset.train.y.tolist() == [0, 1, 2, 9]
    assert dataset.test is not None and len(dataset.test) == 4
    assert dataset.task.outputs == {"cifar10": 10, "cifar100": 100}[name]


@pytest.mark.parametrize("flag", ["pneumoniamnist", "chestmnist", "medmnist:pathmnist"])
def test_medmnist_is_loaded_from_download(
    flag: str, npz: Any, tmp_path: Path, serve_medmnist: Callable[..., Path]
) -> None:
    name = flag.removeprefix("medmnist:")
    several = {
        f"{s}_labels": np.eye(14, dtype=np.uint8)[np.arange(n) % 14]
        for s, n in (("train", 30), ("val", 6), ("test", 9))
    }
    serve_medmnist(npz(**(several if name == "chestmnist" else {})), name)
    dataset = get(flag, tmp_path / "root")
    assert dataset.name == name and dataset.validation is not None and len(dataset.validation) == 6
    assert len(dataset.task.names) == dataset.task.outputs and "MedMNIST" in dataset.about
    assert dataset.task.kind == ("multilabel" if name == "chestmnist" else "multiclass")
    if name == "chestmnist":
        assert (
            dataset.train.y is not None
            and dataset.train.y.shape == (30, 14)
            and dataset.train.y.is_floating_point()
        )


def test_medmnist_2d_sets_match_the_package(medmnist: ModuleType) -> None:
    from hetero_fl.data.sources.images import OUTPUTS, SIDES

    flat = {name: info for name, info in medmnist.INFO.items() if not name.endswith("3d")}
    assert {name: len(info["label"]) for name, info in flat.items()} == OUTPUTS
    several = [name for name, info in flat.items() if info["task"].startswith("multi-label")]
    assert several == ["chestmnist"]
    for name, side in itertools.product(OUTPUTS, SIDES):
        info = medmnist.INFO[name]
        suffix = "" if side == 28 else f"_{side}"
        assert len(info[f"MD5{suffix}"]) == 32 and f"{name}{suffix}.npz" in info[f"url{suffix}"]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "bloodmnist"])
def test_failed_download_raises_one_line(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    medmnist: ModuleType,
) -> None:
    with socket.socket() as closed:  # a port without a listener
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", address + "cifar.tar.gz")
        monkeypatch.setitem(medmnist.INFO["bloodmnist"], "url", address + "bloodmnist.npz")
        line = refusal(get, name, tmp_path)
    assert line.startswith(f"data.name: download of {name} failed (") and line.endswith(
        "; set data.path to a local file"
    )
    assert (
        ("refused" in line or "Error downloading" in line) and "\n" not in line and len(line) < 400
    )
    assert capfd.readouterr() == ("", "")
    assert socket.getdefaulttimeout() is None
    (tmp_path / "file").write_text("")
    check_refused(f"download of {name} failed", get, name, tmp_path / "file" / "below")


def test_missing_package_names_the_extra(
    npz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "medmnist", None)
    check_refused(r"pip install 'hetero_fl\[datasets\]'", get, "pathmnist", tmp_path)
    local = load_source(SourceConfig(name="pathmnist", path=str(npz())), tmp_path)
    assert local.name == "pathmnist" and local.task.outputs == 9


def test_interrupt_during_download_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_url", Mock(side_effect=KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        get("pathmnist", tmp_path)


@pytest.mark.parametrize("size", [28, 64])
def test_size_selects_the_file_of_medmnist(
    size: int, npz: Any, tmp_path: Path, serve_medmnist: Callable[..., Path]
) -> None:
    images = {f"{s}_images": np.zeros((n, size, size, 3), np.uint8) for s, n in ROWS.items()}
    file = serve_medmnist(npz(**images), "pathmnist", "" if size == 28 else f"_{size}")

    dataset = get("pathmnist", tmp_path / "root", size=size)
    file.unlink()
    again = get("pathmnist", tmp_path / "root", size=size)

    assert dataset.train.x.shape == again.train.x.shape == (30, 3, size, size)
    assert [f.name for f in (tmp_path / "root").iterdir()] == [file.name]


def test_wrong_checksum_is_detected(
    npz: Any, tmp_path: Path, serve_medmnist: Callable[..., Path]
) -> None:
    file = serve_medmnist(npz(), "pathmnist", "_64")
    file.write_bytes(npz(extra=np.zeros(1)).read_bytes())

    check_refused(
        r"download of pathmnist failed .*corrupted", get, "pathmnist", tmp_path / "root", size=64
    )


def test_size_selects_a_file_in_a_folder(npz: Any, tmp_path: Path) -> None:
    for side in (28, 64):
        images = {f"{s}_images": np.zeros((n, side, side), np.uint8) for s, n in ROWS.items()}
        npz(f"retinamnist{'' if side == 28 else '_64'}.npz", **images)

    def load(path: Path, size: int | None = None) -> Dataset:
        return load_source(SourceConfig(name="retinamnist", path=str(path), size=size), tmp_path)

    assert load(tmp_path).train.x.shape == (30, 1, 28, 28)
    assert load(tmp_path, 64).train.x.shape == (30, 1, 64, 64)
    assert load(tmp_path / "retinamnist_64.npz").train.x.shape == (30, 1, 64, 64)
    assert load(tmp_path / "retinamnist_64.npz", 64).task.outputs == 5
    check_refused(
        r"data\.size: expected 64x64 pixels in .*, got 28x28; did",
        load,
        tmp_path / "retinamnist.npz",
        64,
    )
    check_refused(
        r"got 64x64; remove size, or set path to the file of",
        load,
        tmp_path / "retinamnist_64.npz",
        128,
    )
    check_refused(r"file '.*retinamnist_128\.npz' not found; did you mean", load, tmp_path, 128)


@each_case(
    ("source", "local", "folder", "archive"),
    (
        (movies, "movies", "ml-100k", "ml-100k.zip"),
        (speech, "speech", "speech_commands_v0.02", "speech_commands_v0.02.tar.gz"),
    ),
)
def test_archive_is_downloaded_once_and_checked(
    source: Any,
    local: str,
    folder: str,
    archive: str,
    server: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content, root = tmp_path / "content", tmp_path / "root"
    if source is movies:
        write_movielens_folder(content / folder)
    else:
        write_speech_folder(content)
    name = {"movies": "movielens_100k", "speech": "speech_commands"}[local]
    file = publish(content, archive, server, source, monkeypatch)
    data = file.read_bytes()

    file.write_bytes(data[:-100])
    message = refusal(get, name, root)
    assert not (root / folder).exists()
    file.write_bytes(data)
    first = get(name, root)
    file.unlink()

    assert message.startswith(f"data.name: download of {name} failed (RuntimeError: File ")
    assert message.endswith(f"; set data.name={local} and data.path to a local folder")
    assert first.name == name and not first.simulated
    # The archive is removed, and no partial folder remains.
    assert [entry.name for entry in root.iterdir()] == [folder]
    if source is movies:
        assert first.train.group_names == ("other", "zip_1", "zip_9")
        assert len(get("movielens_100k_public", root).train) == 22
    else:
        assert first.train.group_names == ("ann", "bob") and len(first.train) == 12
        assert "CC BY 4.0" in first.about
        assert first.test is not None and len(first.test) == 6
        assert len(get(name, root, speech={"words": ("yes", "no")}).train) == 8
