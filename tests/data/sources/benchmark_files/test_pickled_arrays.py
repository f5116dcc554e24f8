"""Pickled arrays are read without running code of the pickle."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from hetero_fl.data.sources.benchmark_files.pickled_arrays import PickledArray, load_pickled_arrays
from tests.support.cases import each_case


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
