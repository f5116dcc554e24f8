"""Stages of compression: top-k, random-k, low rank, top classes, quantization, half precision.

A chain of stages compresses a vector in which several tensors are concatenated. Each `Stage`
reduces the vector to fewer numbers and side information, such as the indices of these numbers. A
`NumberFormat` at the end of the chain encodes the remaining numbers as bytes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.communication.bit_packing import (
    ByteReader,
    pack_bits,
    read_indices,
    unpack_bits,
    write_indices,
)
from hetero_fl.config.communication import StageConfig
from hetero_fl.core.model_spec import Tensors
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
# An energy above 1 disables the truncation, so that matrices have their largest size.
FULL_ENERGY = 2.0


def compress_low_rank(tensors: Mapping[str, Tensor], energy: float) -> Tensors:
    """Approximate matrices by a truncated SVD (Wu et al. 2022, FedKD, eq. 8).

    A tensor of two or more dimensions is treated as a matrix `[m, n]`, where m is the size of the
    first dimension. The matrix becomes a tensor `[k, m + n]` of k rank-one terms. Each row contains
    a left singular vector, multiplied by the singular value, and a right singular vector. If k such
    rows do not have fewer values than the matrix, the values of the matrix are instead written into
    rows of length m + n, padded with zeros. The two cases differ in the number of rows. Tensors
    with fewer than two dimensions do not change.

    Args:
        tensors: Finite tensors, keyed by name.
        energy: Fraction of the sum of squared singular values that the terms must reach, 0 to 1. If
            greater than 1, no matrix is factored.

    Returns:
        The compressed tensors, keyed by name.
    """
    return {
        n: _terms(t.reshape(len(t), -1), energy) if t.ndim > 1 else t for n, t in tensors.items()
    }


def reconstruct_low_rank(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """Reconstruct tensors from the result of `compress_low_rank`.

    Args:
        packed: The return value of `compress_low_rank`.
        like: Tensors with the original shapes, keyed by name.

    Returns:
        The tensors with the original shapes, keyed by name.
    """
    return {n: _matrix(t, like[n]) if like[n].ndim > 1 else t for n, t in packed.items()}


def widest_packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the largest shape `[rows, m + n]` to which `compress_low_rank` packs a matrix."""
    m = shape[0]
    n = math.prod(shape[1:])
    return _num_packed_rows(m, n), m + n


def _num_packed_rows(m: int, n: int) -> int:
    """Return the number of rows of length m + n that are needed for m * n values."""
    return -(-m * n // (m + n))


def _terms(matrix: Tensor, energy: float) -> Tensor:
    m, n = matrix.shape
    most = _num_packed_rows(m, n)
    if energy <= 1:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        kept = s.square().cumsum(0)
        k = min(int((kept < energy * kept[-1]).sum()) + 1, len(s))
        if k < most:
            return torch.cat([u[:, :k].T * s[:k, None], v[:k]], 1)
    padding = matrix.new_zeros(most * (m + n) - m * n)
    return torch.cat([matrix.reshape(-1), padding]).reshape(most, m + n)


def _matrix(packed: Tensor, like: Tensor) -> Tensor:
    m = len(like)
    n = like[0].numel()
    if len(packed) == _num_packed_rows(m, n):
        return packed.reshape(-1)[: m * n].reshape(like.shape)
    return (packed[:, :m].T @ packed[:, m:]).reshape(like.shape)


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
        return (num_classes - 1).bit_length()

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
class LowRank(Stage):
    """Stage that approximates each matrix of an update by a few rank-one terms.

    See `compress_low_rank`.

    Attributes:
        energy: Fraction of the sum of squared singular values to keep, 0 to 1.
    """

    energy: float

    sorts = frozenset({"change"})
    biased = True

    @override
    def with_worst_case_size(self) -> LowRank:
        return LowRank(FULL_ENERGY)

    @override
    def compresses(self, layout: Layout) -> bool:
        return any(len(shape) > 1 for shape in layout)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        # The SVD needs finite values.
        energy = self.energy if bool(torch.isfinite(numbers).all()) else FULL_ENERGY
        packed = compress_low_rank(
            {str(i): part for i, part in enumerate(split_vector(numbers, layout))}, energy
        )
        packed_layout = tuple(tuple(t.shape) for t in packed.values())
        rows = b"".join(
            packed_shape[0].to_bytes(4, "little")
            for packed_shape, shape in zip(packed_layout, layout, strict=True)
            if len(shape) > 1
        )
        return torch.cat([t.reshape(-1) for t in packed.values()]), packed_layout, rows

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        packed_layout: list[tuple[int, ...]] = []
        for shape in layout:
            if len(shape) > 1:
                max_rows, width = widest_packed_shape(shape)
                rows = source.read_integer(4)
                if not 1 <= rows <= max_rows:
                    raise PayloadError(f"terms of a matrix: expected 1 to {max_rows}, got {rows}")
                packed_layout.append((rows, width))
            else:
                packed_layout.append(shape)
        return tuple(packed_layout), tuple(packed_layout)

    @override
    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        packed = {str(i): part for i, part in enumerate(split_vector(numbers, side_information))}
        like = {str(i): numbers.new_empty(shape) for i, shape in enumerate(layout)}
        return torch.cat([t.reshape(-1) for t in reconstruct_low_rank(packed, like).values()])


@dataclass(frozen=True)
class Quantize(NumberFormat):
    """Number format that quantizes numbers to equidistant levels between -m and m.

    The scale m is the largest magnitude. With b > 1 bits, there are 2^b - 1 levels including zero.
    With one bit, the levels are -m and m. Numbers are rounded stochastically, so that the expected
    value of a decoded number is the number itself (QSGD with the maximum norm, Alistarh et al.
    2017).

    Attributes:
        bits: Bits per number.
        bucket: Number of values that share a scale m. If None, there is one scale per tensor.
        nearest: Whether to round to the nearest level instead. Used if the sender adds the rounding
            error to the next message. With two or more bits, the rounding error is exact in
            floating point (Sterbenz lemma). With one bit, the scale is the mean magnitude, because
            the largest magnitude is much larger than most numbers.
    """

    bits: int
    bucket: int | None = None
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
        for block in self._split_blocks(numbers, layout):
            size = block.abs()
            scales.append(size.mean(1) if self.nearest and self.bits == 1 else size.amax(1))
            scale = torch.where(scales[-1] > 0, scales[-1], torch.ones_like(scales[-1]))
            normalized = block.div(scale[:, None]).view(-1)
            here = slice(at, at := at + len(normalized))
            codes[here] = self._encode_levels(normalized, None if chance is None else chance[here])
        return torch.cat(scales).numpy().tobytes() + pack_bits(codes.numpy(), self.bits)

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
        scales = read_numbers(source, sum(rows for rows, _ in self._block_shapes(layout)), dtype)
        codes = torch.from_numpy(unpack_bits(source, num_values(layout), self.bits))
        numbers = codes.to(dtype)
        numbers = (
            numbers.mul_(2).sub_(1)
            if self.bits == 1
            else numbers.sub_(self._max_level).div_(self._max_level)
        )
        at = 0
        for block in self._split_blocks(numbers, layout):
            block.mul_(scales[at : (at := at + len(block)), None])
        return numbers

    @property
    def _max_level(self) -> int:
        """The integer of the highest level. The lowest level is `-_max_level`."""
        return max(1, 2 ** (self.bits - 1) - 1)

    def _block_shapes(self, layout: Layout) -> Iterator[tuple[int, int]]:
        """Yield the shapes `[rows, width]` of blocks whose rows have separate scales."""
        for size in map(prod, layout):
            width = min(size, self.bucket or size)
            if size:
                yield size // width, width
            if size and size % width:
                yield 1, size % width

    def _split_blocks(self, numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
        shapes = list(self._block_shapes(layout))
        for flat, shape in zip(numbers.split([r * w for r, w in shapes]), shapes, strict=True):
            yield flat.view(shape)


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

    Attributes:
        entropy: Whether to compress the indices with LZMA if the result is shorter.
    """

    entropy: bool = False

    biased = True

    @override
    def with_worst_case_size(self) -> TopK:
        return TopK(self.amount)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        k = self.num_kept(len(numbers))
        indices = largest_indices(numbers, k)
        return numbers[indices], ((k,),), write_indices(indices.numpy(), len(numbers), self.entropy)

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        k = self.num_kept(num_values(layout))
        return ((k,),), torch.from_numpy(read_indices(source, k, num_values(layout)))


@dataclass(frozen=True)
class RandomK(SparseStage):
    """Stage that keeps k of n numbers, which are selected uniformly at random.

    The sender and the receiver draw the same indices from generators with the same seed. The
    indices are therefore not sent.

    Attributes:
        scaled: Whether to divide the kept numbers by the sampling rate k / n, so that the expected
            value of the decompressed vector is the vector itself. Set to False if omitted values
            are added to the next message.
    """

    scaled: bool = True

    # The base class declares a class variable, but here the value depends on the attribute
    # `scaled`.
    @property
    @override
    def biased(self) -> bool:  # type: ignore[override]
        return not self.scaled

    def _draw_indices(self, total: int, draw: Draw) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (1,), generator=draw("randk")))
        chosen = np.random.default_rng(seed).choice(
            total, self.num_kept(total), replace=False, shuffle=False
        )
        chosen.sort()
        return torch.from_numpy(chosen)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        indices = self._draw_indices(len(numbers), draw)
        kept = numbers[indices]
        if self.scaled:
            kept = kept * (len(numbers) / len(indices))
        return kept, ((len(indices),),), b""

    @override
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        return ((self.num_kept(num_values(layout)),),), self._draw_indices(num_values(layout), draw)


def largest_indices(numbers: Tensor, k: int) -> Tensor:
    """Return the ascending indices of the k numbers of largest magnitude.

    The result is deterministic even if several numbers have the same magnitude.
    """
    size = numbers.abs().numpy()
    indices = np.argpartition(size, len(size) - k)[len(size) - k :]
    indices.sort()
    return torch.from_numpy(indices)


# Functions that create a stage from its settings and `channel.entropy`, keyed by name in the
# configuration.
STAGE_TYPES: dict[str, Callable[[StageConfig, bool], Stage | NumberFormat]] = {
    "topk": lambda c, entropy: TopK(c.topk or 0, entropy),
    "randk": lambda c, _entropy: RandomK(c.randk or 0),
    "lowrank": lambda c, _entropy: LowRank(c.lowrank or 0),
    "top_classes": lambda c, _entropy: TopClasses(c.top_classes or 0),
    "quantize": lambda c, _entropy: Quantize(c.quantize or 0, c.bucket),
    "half": lambda _c, _entropy: HalfPrecision(),
}


def with_worst_case_size(
    stages: Sequence[Stage | NumberFormat],
) -> tuple[Stage | NumberFormat, ...]:
    """Return a chain with the maximum message size of the given chain (see `Stage`)."""
    return tuple(
        stage.with_worst_case_size() if isinstance(stage, Stage) else stage for stage in stages
    )


def build_stages(
    chain: Sequence[StageConfig], entropy: bool, has_feedback: bool = False
) -> tuple[Stage | NumberFormat, ...]:
    """Return the stages of a configured chain, in order.

    Args:
        chain: Settings of the stages.
        entropy: Whether to compress indices with LZMA if the result is shorter.
        has_feedback: Whether omitted values are added to the next message. If True, `RandomK` does
            not divide the kept numbers by the sampling rate.
    """
    stages = tuple(STAGE_TYPES[stage.kind](stage, entropy) for stage in chain)
    if not has_feedback:
        return stages
    return tuple(replace(s, scaled=False) if isinstance(s, RandomK) else s for s in stages)
