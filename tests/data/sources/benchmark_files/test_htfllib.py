"""Client folders of PFLlib and HtFLlib, whose pickled arrays are read without running code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as arrays

import hetero_fl
from hetero_fl.config.data import SourceConfig
from hetero_fl.data import Dataset, load_source
from hetero_fl.data.sources.benchmark_files.pickled_arrays import PickledArray, load_pickled_arrays
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.preparation import load_federated_data
from hetero_fl.utils.errors import UserError
from tests.support.benchmark_folders import write_client_file, write_client_folder
from tests.support.cases import each_case
from tests.support.mistakes import check_broken_folders, check_refused


def load(path: Path) -> Dataset:
    return load_source(SourceConfig(name="htfllib", path=str(path)), path)


def library_rows(path: Path, split: str, client: int) -> dict[str, torch.Tensor]:
    """Read the rows of a client like `read_client_data` of HtFLlib."""
    with (path / split / f"{client}.npz").open("rb") as file:
        data = np.load(file, allow_pickle=True)["data"].tolist()
    return {"x": torch.Tensor(data["x"]), "y": torch.Tensor(data["y"]).type(torch.int64)}


def configuration(path: Path, **data: Any) -> dict[str, Any]:
    return {
        "rounds": 2,
        "data": {
            "name": "htfllib",
            "path": str(path),
            "partition": {"kind": "natural", "min_size": 1},
            "validation": 0,
            "split": {"validation": 0},
            **data,
        },
        "clients": {
            "groups": [
                {"name": "c0", "model": "lenet"},
                {"name": "c1", "model": "mlp"},
                {"name": "c2", "model": "lenet"},
            ]
        },
        "algorithm": {"name": "fedproto"},
        "output": {"plots": False, "report": False},
    }


def write_array_version(path: Path, version: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x", "y"):
            archive.writestr(f"{name}.npy", b"\x93NUMPY" + bytes([version, 0]) + b"{}" * 40)


def set_classes(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


BROKEN: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    (
        "folder",
        lambda d: replace_by_folder(d / "train" / "0.npz"),
        {},
        "0.npz: expected a file, got a folder",
    ),
    (
        "version",
        lambda d: write_array_version(d / "train" / "0.npz", 3),
        {},
        "client file (version 3.0 of arrays is not read)",
    ),
    (
        "empty",
        lambda d: (d / "train" / "0.npz").write_bytes(b""),
        {},
        "client file (File is not a zip file)",
    ),
    ("text", set_classes('{"num_classes": "10"}'), {}, "num_classes: expected an integer from 2 "),
    ("word", set_classes('{"num_classes": "ten"}'), {}, "to 10,000, got 'ten'"),
    ("not JSON", set_classes("{"), {}, "config.json: not a readable JSON file"),
    ("no folder", shutil.rmtree, {}, "data.path: folder 'DIR' not found"),
    (
        "no training",
        lambda d: shutil.rmtree(d / "train"),
        {},
        "folder 'train' not found; expected train/K.npz",
    ),
    (
        "no test rows",
        lambda d: (d / "test" / "1.npz").unlink(),
        {},
        "file 'test/1.npz' not found, but the client has a file",
    ),
]


def test_malformed_folder_raises_one_line(subtests: pytest.Subtests) -> None:
    check_broken_folders(subtests, BROKEN, write_client_folder, load)


def test_clients_have_the_same_rows_as_in_the_library(tmp_path: Path) -> None:
    path = write_client_folder(tmp_path)

    data = load_federated_data(load_config(configuration(path)))

    for client in range(3):
        for split in ("train", "test"):
            rows = data.client_rows[f"c{client}"][split].copy_rows()
            expected = library_rows(path, split, client)
            assert torch.equal(rows.x, expected["x"])
            assert torch.equal(rows.labels, expected["y"])
        assert data.n_rows(f"c{client}", "validation") == 0
    assert data.n_test == 8 + 9 + 10 and data.task.outputs == 2


def test_clients_train_on_their_own_rows(tmp_path: Path) -> None:
    path = write_client_folder(tmp_path / "mnist")

    run = hetero_fl.run(configuration(path), out=tmp_path / "run", quiet=True)

    clients = {client["id"]: client["n_train"] for client in run.summary["clients"]}
    assert clients == {"c0": 24, "c1": 25, "c2": 26}
    assert run.summary["personal"]["last"]["accuracy"] > 0.7


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


IMAGES = np.zeros((3, 1, 4, 4), np.float32)


def test_malformed_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for number, (rows, message) in enumerate(
        (
            ({"x": IMAGES}, "'y' not found; the file has 'x'"),
            ({"x": IMAGES, "y": [0, 1]}, "y: expected 3 rows as in x, got 2"),
            ({"x": IMAGES, "y": [0, 1, 0.5]}, "y: row 2: expected a class number, got 0.5"),
            ({"x": IMAGES, "y": [0, 1, 2]}, "y: row 2: label 2 is out of range 0 to 1"),
            ({"x": IMAGES, "y": [0, 1, -1]}, "y: row 2: label -1 is out of range"),
            ({"x": IMAGES, "y": [[0, 1]] * 3}, "y: expected an array of numbers, got lists"),
            ({"x": IMAGES, "y": None}, "y: expected an array of numbers, got NoneType"),
            (
                {"x": np.zeros((3, 1, 5, 4), np.float32), "y": [0, 1, 0]},
                r"expected rows of float32 and shape \(1, 4, 4\) as in .*train/0.npz: x, got",
            ),
            ({"x": IMAGES[:, 0], "y": [0, 1, 0]}, r"expected shape \(N, C, H, W\) or \(N, D\)"),
            ({"x": np.zeros((3, 80), np.int64), "y": [0, 1, 0]}, "files of texts are not read"),
            (
                {"x": np.array([([1, 2], 2)] * 3, dtype=object), "y": [0, 1, 0]},
                "lists; files of texts",
            ),
            ({"x": [np.zeros(2), np.zeros(3), np.zeros(2)], "y": [0, 1, 0]}, r"\(2,\) and \(3,\)"),
            ({"x": IMAGES + np.nan, "y": [0, 1, 0]}, "x: row 0: NaN or infinite value"),
            ({"x": IMAGES, "y": Evil()}, r"it uses '\w+\.system'"),
            ({"x": [IMAGES[:1]] * 10**5, "y": [0, 1, 0]}, "x: expected 3 rows as in y, got 100000"),
            (
                {"x": [np.zeros((1, 1000, 1000))] * 90_000, "y": [0, 1] * 45_000},
                "x: needs 670.6 GiB of",
            ),
        )
    ):
        with subtests.test(message=message):
            folder = tmp_path / str(number)
            folder.mkdir()
            path = write_client_folder(folder)
            for split, count in (("train", 4), ("test", 3)):
                images = np.zeros((count, 1, 4, 4), np.float32)
                write_client_file(path / split / "0.npz", x=images, y=np.arange(count) % 2)
                (path / split / "2.npz").unlink()
            write_client_file(path / "train" / "1.npz", **rows)
            monkeypatch.chdir(folder)

            caught = check_refused(message, load, path)

            assert "train/1.npz" in caught
            assert not (folder / "hacked").exists()


@settings(
    max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_files_give_one_line(data: st.DataObject, tmp_path: Path) -> None:
    path = write_client_folder(tmp_path, clients=1, rows=2)
    file = path / "train" / "0.npz"
    member = zipfile.ZipFile(file).read("data.npy")
    damaged = bytearray(member)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    if data.draw(st.booleans()):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("data.npy", bytes(damaged))
    else:
        file.write_bytes(file.read_bytes()[: data.draw(st.integers(0, 200))])

    try:
        load(path)
    except UserError as error:
        assert "\n" not in str(error) and "0.npz" in str(error) and len(str(error)) < 1000


def test_pickle_cannot_announce_a_large_memo(subtests: pytest.Subtests) -> None:
    for code in (b"r\x00\x00\x00\x08", b"p134217728\n"):
        with (
            subtests.test(code=code),
            pytest.raises(pickle.UnpicklingError, match="it numbers more objects than it contains"),
        ):
            load_pickled_arrays(io.BytesIO(b"\x80\x02N" + code + b"."))


def read(data: bytes) -> Any:
    found = load_pickled_arrays(io.BytesIO(data))
    return found.content if isinstance(found, PickledArray) else found


@settings(max_examples=60, derandomize=True)
@given(
    array=arrays.arrays(
        dtype=st.one_of(
            arrays.boolean_dtypes(),
            arrays.integer_dtypes(endianness="?"),
            arrays.unsigned_integer_dtypes(endianness="?"),
            arrays.floating_dtypes(endianness="?"),
        ),
        shape=arrays.array_shapes(min_dims=0, min_side=0, max_side=4),
    ),
    protocol=st.integers(3, pickle.HIGHEST_PROTOCOL),
    axes=st.booleans(),
)
def test_arrays_of_numbers_are_equal(array: np.ndarray, protocol: int, axes: bool) -> None:
    array = array.T if axes else array

    found = read(pickle.dumps(array, protocol))

    assert found.dtype == array.dtype
    assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


def test_names_of_older_numpy_are_read() -> None:
    data = pickle.dumps({"x": np.arange(3.0), "n": np.int64(4)}, 3)
    older = data.replace(b"numpy._core", b"numpy.core")

    assert older != data
    found = read(older)
    assert found["x"].content.tolist() == [0, 1, 2] and found["n"] == 4


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_other_objects_are_rejected(
    tmp_path: Any, monkeypatch: Any, subtests: pytest.Subtests
) -> None:
    for content, message in (
        (Call(os.system, "touch hacked"), r"it uses '\w+\.system'"),
        (Call(eval, "1"), r"it uses 'builtins\.eval'"),
        (np.array([Call(os.getcwd)], dtype=object), r"it uses '\w+\.getcwd'"),
        (Call(np.load, "data.npy"), r"it uses 'numpy\.load'"),
        (np.datetime64("2020-01-01"), r"got the dtype 'M8'"),
        (np.array(["text"]), r"got the dtype 'U4'"),
        ({"x": {1, 2}}, None),
    ):
        for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
            with subtests.test(protocol=protocol):
                monkeypatch.chdir(tmp_path)
                data = pickle.dumps(content, protocol)

                if message is None:
                    # Sets have an opcode of their own from protocol 4 on and are harmless.
                    assert protocol < 4 or read(data) == content
                    return
                with pytest.raises(pickle.UnpicklingError, match=message):
                    read(data)
                assert not list(tmp_path.iterdir())


def test_state_of_a_data_type_cannot_turn_bytes_into_objects() -> None:
    # With NumPy's own functions, these flags would make it use the bytes as addresses of objects.
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I00\nI01\ntR"
    state = b"(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI0\ntb"
    make = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
    data = b"\x80\x03" + make + b"(I1\n(I1\nt" + dtype + state + b"I00\nC\x08AAAAAAAAtb."

    with pytest.raises(pickle.UnpicklingError, match="expected a list of objects"):
        read(data)


@each_case("name", (b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"))
def test_classes_of_the_reader_cannot_be_changed(name: Any) -> None:
    data = b"\x80\x03" + name + b"}X\x04\x00\x00\x00evilI1\nsb."

    with pytest.raises(TypeError):
        read(data)


@settings(max_examples=300, derandomize=True)
@given(data=st.data())
def test_damaged_pickles_only_raise_exceptions(data: st.DataObject) -> None:
    content = {"x": np.arange(6.0).reshape(2, 3), "y": [np.int64(1), 0]}
    damaged = bytearray(pickle.dumps(np.array(content, dtype=object), 4))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(2, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    modules = set(sys.modules)

    with contextlib.suppress(Exception):
        read(bytes(damaged))

    assert set(sys.modules) == modules
