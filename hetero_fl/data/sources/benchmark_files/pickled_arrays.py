"""Read pickled NumPy arrays without running code that the pickle names.

A pickle may call any function of any module. `load_pickled_arrays` replaces NumPy's functions with
the classes of this module and rejects all other names. The classes create arrays from the bytes of
the file, so a pickle cannot set the internal state of an array either.
"""

from __future__ import annotations

import math
import pickletools
import re
from pickle import Unpickler, UnpicklingError
from typing import IO, Any

import numpy as np

NUMBER = re.compile(r"[<>=|]?(?:b1|\?|[iu][1248]|f[248])")
"""Codes of the data types of numbers that are read."""
OBJECT = re.compile(r"\|?O[48]?")
"""Codes of the data type of Python objects."""


class PickledDType:
    """The data type of a pickled array, in place of `numpy.dtype`.

    Attributes:
        dtype: Data type of the elements, or None if the elements are Python objects.

    Args:
        code: Code of the data type, such as "f4".
        options: Further arguments of `numpy.dtype`, which are ignored.

    Raises:
        UnpicklingError: If the elements are neither numbers nor Python objects.
    """

    def __init__(self, code: object, *options: object) -> None:
        if not isinstance(code, str) or not (NUMBER.fullmatch(code) or OBJECT.fullmatch(code)):
            raise UnpicklingError(f"expected an array of numbers, got the dtype {code!r}")
        self.dtype = np.dtype(code) if NUMBER.fullmatch(code) else None

    def __setstate__(self, state: Any) -> None:
        """Set the byte order, the second entry of the state of `numpy.dtype`."""
        if self.dtype is not None and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """A pickled array, in place of `numpy.ndarray`.

    Attributes:
        content: Array of numbers, list of Python objects, or None before the state is set.
        shape: Shape of the array.
    """

    def __init__(self) -> None:
        self.content: np.ndarray | list[object] | None = None
        self.shape: tuple[int, ...] = ()

    def __setstate__(self, state: Any) -> None:
        """Set the content from `(version, shape, dtype, is_fortran, data)`.

        Raises:
            UnpicklingError: If the data does not match the shape or the data type.
        """
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Set the content.

        Args:
            data: Elements, as bytes or as a list of Python objects.
            dtype: Data type, a `PickledDType`.
            shape: Shape of the array, a tuple of integers >= 0.
            order: Order of the elements, "C" or "F".

        Raises:
            UnpicklingError: If the data does not match the shape or the data type.
        """
        if not isinstance(dtype, PickledDType):
            raise UnpicklingError("expected a dtype")
        self.shape = tuple(shape)
        if dtype.dtype is None:
            if not isinstance(data, list) or len(data) != math.prod(self.shape):
                raise UnpicklingError(f"expected a list of objects for shape {self.shape}")
            self.content = data
            return
        size = math.prod(self.shape) * dtype.dtype.itemsize
        if (
            not isinstance(data, bytes | bytearray)
            or len(data) != size
            or min((0, *self.shape)) < 0
        ):
            raise UnpicklingError(f"expected {size} bytes for shape {self.shape}")
        self.content = np.frombuffer(data, dtype.dtype).reshape(self.shape, order=order)


class _Function:
    """Base class of the replacements of functions, whose results a pickle cannot change."""

    def __setstate__(self, state: object) -> None:
        raise UnpicklingError("unexpected state")


class _Reconstruct(_Function):
    """Create an empty array, in place of NumPy's function of this name."""

    def __new__(cls, array_class: object, *_: object) -> Any:
        if array_class is not PickledArray:
            raise UnpicklingError("expected the class numpy.ndarray")
        return PickledArray()


class _FromBuffer(_Function):
    """Create an array from bytes, in place of NumPy's function of this name."""

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
        array = PickledArray()
        array.fill(data, dtype, shape, "C" if order == "K" else order)
        if order == "K" and axes is not None and isinstance(array.content, np.ndarray):
            transposed = array.content.transpose(axes)
            array.content = transposed
            array.shape = transposed.shape
        return array


class _Scalar(_Function):
    """Create a number, in place of NumPy's function of this name."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        array = PickledArray()
        array.fill(data, dtype, (1,), "C")
        if not isinstance(array.content, np.ndarray):
            raise UnpicklingError("expected a number, got a Python object")
        return array.content[0].item()


_CLASSES: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): PickledDType,
    ("numpy", "ndarray"): PickledArray,
}
# The private package is `core` before NumPy 2.
for _package in ("numpy.core", "numpy._core"):
    _CLASSES[f"{_package}.multiarray", "_reconstruct"] = _Reconstruct
    _CLASSES[f"{_package}.multiarray", "scalar"] = _Scalar
    _CLASSES[f"{_package}.numeric", "_frombuffer"] = _FromBuffer


class _ArrayUnpickler(Unpickler):
    def find_class(self, module: str, name: str) -> type:
        found = _CLASSES.get((module, name))
        if found is None:
            raise UnpicklingError(
                f"it uses '{module}.{name}'; only NumPy arrays, dictionaries, lists and numbers "
                "are read"
            )
        return found

    def persistent_load(self, pid: object) -> object:
        raise UnpicklingError("it refers to objects outside the file")


def load_pickled_arrays(file: IO[bytes]) -> object:
    """Read a pickle of arrays of numbers, dictionaries, lists, tuples, strings and numbers.

    No function or class of the pickle is called, except the replacements of NumPy's functions in
    this module.

    Args:
        file: Pickle, positioned at its start, which is read twice.

    Returns:
        The object, in which arrays are instances of `PickledArray`.

    Raises:
        UnpicklingError: If the pickle names another function or class, or an array is malformed.
        Exception: If the pickle is damaged. Many kinds of errors are possible.

    Example:
        >>> import io
        >>> import pickle
        >>> import numpy as np
        >>> content = {"y": np.arange(3)}
        >>> load_pickled_arrays(io.BytesIO(pickle.dumps(content)))["y"].content
        array([0, 1, 2])
    """
    start = file.tell()
    # The table of objects has as many entries as the largest number of an object.
    codes = pickletools.genops(file)
    if any("PUT" in code.name and int(str(arg)) > int(place or 0) for code, arg, place in codes):
        raise UnpicklingError("it numbers more objects than it contains")
    file.seek(start)
    return _ArrayUnpickler(file).load()
