"""Stages of compression: top-k, random-k, top classes, quantization and half precision.

A chain of stages compresses a vector in which several tensors are concatenated. Each `Stage`
reduces the vector to fewer numbers and side information, such as the indices of these numbers. A
`NumberFormat` at the end of the chain encodes the remaining numbers as bytes.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.communication.bit_packing import (
    WIDTHS,
    ByteReader,
    pack_bits,
    read_indices,
    unpack_bits,
    write_indices,
)
from hetero_fl.config.communication import StageConfig
from hetero_fl.core.payload import PayloadError

# Meaning of the numbers of an item: an update ("change"), a complete model ("whole"), predictions
# (one per row), or other rows and sums by class ("rows").
Sort = Literal["change", "whole", "predictions", "rows"]
# Shapes of the tensors that are concatenated into one vector.
Layout = tuple[tuple[int, ...], ...]
# Function that returns a random generator for a label. The sender and the receiver use the same
# seed.
Draw = Callable[[str], torch.Generator]
# Largest exponent of the power of two by which half precision scales a tensor, as in float32.
MAX_SHIFT = 126


def num_values(layout: Layout) -> int:
    """Return the length of a vector in which tensors of the given shapes are concatenated."""
    return sum(map(prod, layout))


def split_vector(numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Yield views of the tensors that are concatenated in a vector.

    Args:
        numbers: The vector.
        layout: Shapes of the tensors.
    """
    for flat, shape in zip(numbers.split([prod(shape) for shape in layout]), layout, strict=True):
        yield flat.view(shape)


def read_numbers(source: ByteReader, count: int, dtype: torch.dtype) -> Tensor:
    """Read floating-point numbers.

    Args:
        source: Reader at the start of the values.
        count: Number of values.
        dtype: Data type of the values.

    Raises:
        PayloadError: If fewer bytes remain.
    """
    kind = np.dtype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(np.frombuffer(bytearray(source.take(count * kind.itemsize)), kind))


class Stage(ABC):
    """Base class of stages, which reduce a vector to fewer numbers.

    Vectors have shape `[n]` and a floating-point data type. The layout of a vector consists of the
    shapes of the tensors that are concatenated in the vector.

    Attributes:
        sorts: Meanings of numbers to which the stage applies (see `Sort`).
        biased: Whether the sender must store the values that the stage omits and add the stored
            values to the next message (error feedback).
    """

    sorts: ClassVar[frozenset[Sort]]
    biased: ClassVar[bool]

    def with_worst_case_size(self) -> Stage:
        """Return a stage with the maximum message size of this stage.

        The message size of the returned stage does not depend on the values of the vector.
        """
        return self

    @abstractmethod
    def compresses(self, layout: Layout) -> bool:
        """Return whether the stage changes a vector with the given layout.

        The result depends only on the layout. The sender and the receiver therefore obtain the same
        result.
        """

    @abstractmethod
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        """Compress a vector.

        Args:
            numbers: The vector.
            layout: Layout of the vector.
            draw: Function that returns a random generator for a label.

        Returns:
            The remaining numbers, their layout, and the side information for the receiver.
        """

    @abstractmethod
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        """Read the side information at the receiver.

        Args:
            source: Reader at the start of the side information.
            layout: Layout of the uncompressed vector.
            draw: Function that returns a random generator for a label.

        Returns:
            The layout of the remaining numbers, and the side information for `decompress`.

        Raises:
            PayloadError: If the bytes are malformed.
        """

    @abstractmethod
    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        """Decompress a vector.

        Args:
            numbers: The remaining numbers.
            layout: Layout of the uncompressed vector.
            side_information: Second return value of `decode_side_information`.
        """


class NumberFormat(ABC):
    """Base class of number formats, which encode the numbers at the end of a chain as bytes."""

    sorts: ClassVar[frozenset[Sort]] = frozenset({"change", "whole", "predictions", "rows"})

    @abstractmethod
    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """Encode a vector.

        If the vector contains a value that is not finite, the decoded vector also contains one.

        Args:
            numbers: The vector.
            layout: Layout of the vector.
            draw: Function that returns a random generator for a label.
        """

    @abstractmethod
    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        """Decode a vector.

        Args:
            source: Reader at the start of the encoded vector.
            layout: Layout of the vector.
            dtype: Data type of the numbers.

        Raises:
            PayloadError: If the bytes are malformed.
        """


@dataclass(frozen=True)
class TopClasses(Stage):
    """Stage that keeps the k largest values of each prediction and the mean of the other values.

    Predictions of shape `[N, C]` are reduced to shape `[N, k + 1]`. Decompression preserves the sum
    of each row.

    Attributes:
        k: Number of classes to keep.
    """

    k: int

    sorts = frozenset({"predictions"})
    # Predictions are computed again in each round, so omitted values need not be sent later.
    biased = False

    @override
    def compresses(self, layout: Layout) -> bool:
        return len(layout) == 1 and len(layout[0]) == 2 and self.k + 1 < layout[0][1]

    @staticmethod
    def _class_bits(num_classes: int) -> int:
        return next(bits for bits in WIDTHS if num_classes <= 2**bits)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        ((n, classes),) = layout
        rows = numbers.view(n, classes)
        top_classes = rows.topk(self.k).indices.sort(-1).values
        top = rows.gather(1, top_classes)
        rest = rows.scatter(1, top_classes, 0).sum(1, keepdim=True) / (classes - self.k)
        packed = pack_bits(top_classes.reshape(-1).numpy(), self._class_bits(classes))
        return torch.cat([top, rest], 1).reshape(-1), ((n, self.k + 1),), packed

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        ((n, classes),) = layout
        packed = unpack_bits(source, n * self.k, self._class_bits(classes))
        top_classes = torch.from_numpy(packed).long().view(n, self.k)
        if bool((top_classes >= classes).any()) or bool((top_classes.diff(dim=1) < 1).any()):
            raise PayloadError(f"classes of a row: expected ascending values below {classes}")
        return ((n, self.k + 1),), top_classes

    @override
    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        ((n, classes),) = layout
        rows = numbers.view(n, self.k + 1)
        rest = rows[:, -1:].expand(n, classes)
        return rest.scatter(1, side_information, rows[:, :-1]).reshape(-1)


@dataclass(frozen=True)
class HalfPrecision(NumberFormat):
    """Number format with IEEE half precision, which has 11 significant bits per number.

    Each tensor is first multiplied by a power of two, so that the largest magnitude is close to the
    maximum of half precision. Without this factor, small updates would be rounded to zero, and sums
    of many rows could overflow.
    """

    @override
    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        halves = torch.empty(len(numbers), dtype=torch.float16)
        shifts = []
        at = 0
        for part in split_vector(numbers, layout):
            most = float(part.abs().amax()) if part.numel() else 0.0
            shift = 0
            if np.isfinite(most):
                shift = max(-MAX_SHIFT, min(MAX_SHIFT, 15 - int(np.frexp(most)[1])))
            halves[at : (at := at + part.numel())] = part.reshape(-1) * 2.0**shift
            shifts.append(shift)
        return np.array(shifts, np.int8).tobytes() + halves.numpy().tobytes()

    @override
    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        shifts = np.frombuffer(source.take(len(layout)), np.int8).tolist()
        numbers = torch.from_numpy(
            np.frombuffer(bytearray(source.take(2 * num_values(layout))), "<f2")
        ).to(dtype)
        for part, shift in zip(split_vector(numbers, layout), shifts, strict=True):
            part.mul_(2.0 ** -max(-MAX_SHIFT, min(MAX_SHIFT, shift)))
        return numbers


@dataclass(frozen=True)
class FullPrecision(NumberFormat):
    """Number format that encodes numbers without loss. This is the default format."""

    @override
    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        return numbers.numpy().tobytes()

    @override
    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        return read_numbers(source, num_values(layout), dtype)


@dataclass(frozen=True)
class Quantize(NumberFormat):
    """Number format that quantizes numbers to equidistant levels between -m and m.

    The scale m is the largest magnitude of a tensor. With b > 1 bits, there are 2^b - 1 levels
    including zero. With one bit, the levels are -m and m. Numbers are rounded stochastically, so
    that the expected value of a decoded number is the number itself (QSGD with the maximum norm,
    Alistarh et al. 2017).

    Attributes:
        bits: Bits per number.
        nearest: Whether to round to the nearest level instead. Used if the sender adds the rounding
            error to the next message. With two or more bits, the rounding error is exact in
            floating point (Sterbenz lemma). With one bit, the scale is the mean magnitude, because
            the largest magnitude is much larger than most numbers.
    """

    bits: int
    nearest: bool = False

    @override
    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        codes = torch.empty(len(numbers), dtype=torch.uint8 if self.bits <= 8 else torch.int32)
        chance = (
            None
            if self.nearest
            else torch.rand(len(numbers), generator=draw("quantize"), dtype=numbers.dtype)
        )
        scales = []
        at = 0
        for part in self._nonempty_parts(numbers, layout):
            size = part.abs()
            scales.append(size.mean() if self.nearest and self.bits == 1 else size.amax())
            scale = torch.where(scales[-1] > 0, scales[-1], torch.ones_like(scales[-1]))
            normalized = part.div(scale).view(-1)
            here = slice(at, at := at + len(normalized))
            codes[here] = self._encode_levels(normalized, None if chance is None else chance[here])
        return torch.stack(scales).numpy().tobytes() + pack_bits(codes.numpy(), self.bits)

    def _encode_levels(self, normalized: Tensor, chance: Tensor | None) -> Tensor:
        """Round numbers in [-1, 1] to indices of levels, where the lowest level has index 0.

        If `chance` is None, numbers are rounded to the nearest level. Otherwise, numbers are
        rounded stochastically with the uniform random numbers `chance`.
        """
        if self.bits == 1:
            level = normalized.add_(1).div_(2)
            if chance is None:
                level = (level >= 0.5).to(normalized.dtype)
            else:
                level = level.add_(chance).floor_()
            return level.nan_to_num_(0).clamp_(0, 1)
        level = normalized.mul_(self._max_level)
        level = level.round_() if chance is None else level.add_(chance).floor_()
        return level.nan_to_num_(0).clamp_(-self._max_level, self._max_level).add_(self._max_level)

    @override
    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        scales = read_numbers(source, sum(prod(shape) > 0 for shape in layout), dtype)
        codes = torch.from_numpy(unpack_bits(source, num_values(layout), self.bits))
        numbers = codes.to(dtype)
        numbers = (
            numbers.mul_(2).sub_(1)
            if self.bits == 1
            else numbers.sub_(self._max_level).div_(self._max_level)
        )
        for part, scale in zip(self._nonempty_parts(numbers, layout), scales, strict=True):
            part.mul_(scale)
        return numbers

    @property
    def _max_level(self) -> int:
        """The integer of the highest level. The lowest level is `-_max_level`."""
        return max(1, 2 ** (self.bits - 1) - 1)

    @staticmethod
    def _nonempty_parts(numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
        return (part for part in split_vector(numbers, layout) if part.numel())


@dataclass(frozen=True)
class SparseStage(Stage):
    """Base class of stages that send some of the numbers of an update.

    The receiver sets all other numbers to zero.

    Attributes:
        amount: Fraction of the numbers to keep if a float, or number of values to keep if an int.
            At least one value is kept.
    """

    amount: int | float

    sorts = frozenset({"change"})

    def num_kept(self, total: int) -> int:
        """Return the number of values that are sent if the vector has `total` values."""
        if isinstance(self.amount, int):
            return min(self.amount, total)
        return max(1, ceil(self.amount * total))

    @override
    def compresses(self, layout: Layout) -> bool:
        return self.num_kept(num_values(layout)) < num_values(layout)

    @override
    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        return numbers.new_zeros(num_values(layout)).scatter_(0, side_information, numbers)


@dataclass(frozen=True)
class TopK(SparseStage):
    """Stage that keeps the k numbers of largest magnitude and their indices (Stich et al. 2018).

    The size of compressed indices depends on the indices and is largest if they are spread
    uniformly.

    Attributes:
        is_worst_case: Whether to send uniformly spread indices, which are compressed less well.
    """

    is_worst_case: bool = False

    biased = True

    @override
    def with_worst_case_size(self) -> TopK:
        return TopK(self.amount, is_worst_case=True)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        k = self.num_kept(len(numbers))
        if self.is_worst_case:
            indices = random_indices(len(numbers), k, seed=0)
            coded = write_indices(indices.numpy(), zlib.Z_HUFFMAN_ONLY)
        else:
            indices = largest_indices(numbers, k)
            coded = write_indices(indices.numpy())
        return numbers[indices], ((k,),), coded

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        k = self.num_kept(num_values(layout))
        return ((k,),), torch.from_numpy(read_indices(source, k, num_values(layout)))


@dataclass(frozen=True)
class RandomK(SparseStage):
    """Stage that keeps k of n numbers, which are selected uniformly at random.

    The kept numbers are divided by the sampling rate k / n, so that the expected value of the
    decompressed vector is the vector itself. The sender and the receiver draw the same indices from
    generators with the same seed. The indices are therefore not sent.
    """

    biased = False

    def _draw_indices(self, total: int, draw: Draw) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (1,), generator=draw("randk")))
        return random_indices(total, self.num_kept(total), seed)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        indices = self._draw_indices(len(numbers), draw)
        kept = numbers[indices] * (len(numbers) / len(indices))
        return kept, ((len(indices),),), b""

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        return ((self.num_kept(num_values(layout)),),), self._draw_indices(num_values(layout), draw)


def random_indices(total: int, k: int, seed: int) -> Tensor:
    """Return k of `total` indices in ascending order, which are selected uniformly at random."""
    chosen = np.random.default_rng(seed).choice(total, k, replace=False, shuffle=False)
    chosen.sort()
    return torch.from_numpy(chosen)


def largest_indices(numbers: Tensor, k: int) -> Tensor:
    """Return the ascending indices of the k numbers of largest magnitude.

    The result is deterministic even if several numbers have the same magnitude.
    """
    size = numbers.abs().numpy()
    indices = np.argpartition(size, len(size) - k)[len(size) - k :]
    indices.sort()
    return torch.from_numpy(indices)


# Functions that create a stage from its settings, keyed by name in the configuration.
STAGE_TYPES: dict[str, Callable[[StageConfig], Stage | NumberFormat]] = {
    "topk": lambda c: TopK(c.topk or 0),
    "randk": lambda c: RandomK(c.randk or 0),
    "top_classes": lambda c: TopClasses(c.top_classes or 0),
    "quantize": lambda c: Quantize(c.quantize or 0),
    "half": lambda _: HalfPrecision(),
}


def with_worst_case_size(
    stages: Sequence[Stage | NumberFormat],
) -> tuple[Stage | NumberFormat, ...]:
    """Return a chain with the maximum message size of the given chain (see `Stage`)."""
    return tuple(
        stage.with_worst_case_size() if isinstance(stage, Stage) else stage for stage in stages
    )


def build_stages(chain: Sequence[StageConfig]) -> tuple[Stage | NumberFormat, ...]:
    """Return the stages of a configured chain, in order."""
    return tuple(STAGE_TYPES[stage.kind](stage) for stage in chain)
