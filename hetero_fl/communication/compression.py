"""Stages of compression: top-k, random-k, top classes, quantization and half precision.

A chain of stages compresses a vector in which several tensors are concatenated. Each stage replaces
the vector by a shorter one or by one of a smaller data type, and may add a tensor that the receiver
needs, such as the indices of the remaining numbers.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.config.communication import StageConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.payload import PayloadError
from hetero_fl.utils.serialization import as_bytes, as_tensor

# Meaning of the numbers of an item: an update ("change"), a complete model ("whole"), predictions
# (one per row), or other rows and sums by class ("rows").
Sort = Literal["change", "whole", "predictions", "rows"]
SORTS: tuple[Sort, ...] = ("change", "whole", "predictions", "rows")
# Shapes of the tensors that are concatenated into one vector.
Layout = tuple[tuple[int, ...], ...]
# Function that returns a random generator for a label. The sender and the receiver use the same
# seed.
Draw = Callable[[str], torch.Generator]
# Bits of packed integers.
WIDTHS = (1, 2, 4, 8, 16, 32)
# Largest exponent of the power of two by which half precision scales a tensor, as in float32.
MAX_SHIFT = 126


def num_values(layout: Layout) -> int:
    """Return the length of a vector in which tensors of the given shapes are concatenated."""
    return sum(map(math.prod, layout))


def split_vector(numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
    """Yield views of the tensors that are concatenated in a vector.

    Args:
        numbers: The vector.
        layout: Shapes of the tensors.
    """
    for flat, shape in zip(
        numbers.split([math.prod(shape) for shape in layout]), layout, strict=True
    ):
        yield flat.view(shape)


def take(tensors: Tensors, name: str, dtype: torch.dtype, count: int) -> Tensor:
    """Remove a vector from received tensors, and check the vector.

    Args:
        tensors: The received tensors, keyed by name.
        name: Name of the vector.
        dtype: Expected data type.
        count: Expected length.

    Raises:
        PayloadError: If the vector is missing or has another data type or length.
    """
    vector = tensors.pop(name, None)
    if vector is None or vector.dtype != dtype or vector.shape != (count,):
        found = "nothing" if vector is None else f"{vector.dtype} of shape {tuple(vector.shape)}"
        raise PayloadError(
            f"{name}: expected {count:,} values of {dtype}, as configured in channel.compress, "
            f"got {found}"
        )
    return vector


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers into `bits` bits each.

    Several integers of less than 8 bits share a byte, the first one in the lowest bits. Longer
    integers are stored as the lowest byte of all values, then the second byte of all values, and
    so on.

    Args:
        values: Integers from 0 to 2^bits - 1, shape `[N]`.
        bits: Bits per integer, one of `WIDTHS`.

    Returns:
        The packed integers, dtype uint8, shape `[ceil(N * bits / 8)]`.
    """
    if bits >= 8:
        size = bits // 8
        planes = values.numpy().astype(f"<u{size}").view(np.uint8).reshape(-1, size).T
        return torch.from_numpy(planes.reshape(-1))
    per_byte = 8 // bits
    padded = np.zeros(-(-len(values) // per_byte) * per_byte, np.uint8)
    padded[: len(values)] = values.numpy()
    shifted = padded.reshape(-1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    return torch.from_numpy(np.bitwise_or.reduce(shifted, axis=1))


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Unpack integers that were packed by `pack_bits`.

    Args:
        packed: The packed integers, dtype uint8, shape `[ceil(count * bits / 8)]`.
        count: Number of integers.
        bits: Bits per integer, one of `WIDTHS`.

    Returns:
        Integers of the smallest unsigned type, shape `[count]`.
    """
    if bits >= 8:
        size = bits // 8
        planes = packed.numpy().reshape(size, count)
        return torch.from_numpy(planes.T.copy().view(f"<u{size}").reshape(-1))
    parts = packed.numpy()[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)
    return torch.from_numpy((parts & (2**bits - 1)).reshape(-1)[:count])


def take_packed(tensors: Tensors, name: str, count: int, bits: int) -> Tensor:
    """Remove packed integers from received tensors, and unpack them.

    Args:
        tensors: The received tensors, keyed by name.
        name: Name of the packed integers.
        count: Number of integers.
        bits: Bits per integer, one of `WIDTHS`.

    Raises:
        PayloadError: If the tensor is missing or has another data type or length.
    """
    packed = take(tensors, name, torch.uint8, -(-count * bits // 8))
    return unpack_bits(packed, count, bits)


def compress_indices(indices: Tensor, strategy: int = zlib.Z_RLE) -> Tensor:
    """Compress ascending indices.

    The differences of the indices are stored byte by byte (see `pack_bits`) and compressed, each
    byte with a code of its own.

    Args:
        indices: At least one index, int64, shape `[K]`.
        strategy: Strategy of zlib.

    Returns:
        The compressed indices, dtype uint8.
    """
    gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
    compressor = zlib.compressobj(strategy=strategy)
    parts = []
    for plane in pack_bits(gaps, 32).chunk(4):
        parts += [compressor.compress(as_bytes(plane)), compressor.flush(zlib.Z_PARTIAL_FLUSH)]
    return as_tensor(b"".join([*parts, compressor.flush()]))


def decompress_indices(compressed: Tensor, count: int, total: int) -> Tensor:
    """Decompress indices that were compressed by `compress_indices`.

    Args:
        compressed: The compressed indices, which may be any tensor.
        count: Number of indices, at least 1.
        total: Exclusive upper bound of the indices.

    Returns:
        Ascending indices, int64, shape `[count]`.

    Raises:
        PayloadError: If the bytes are malformed, or the indices are not ascending below `total`.
    """
    decompressor = zlib.decompressobj()
    try:
        packed = decompressor.decompress(as_bytes(compressed), 4 * count + 1)
    except zlib.error:
        raise PayloadError("indices: cannot be decompressed") from None
    if len(packed) != 4 * count or not decompressor.eof:
        raise PayloadError(f"indices: expected {count:,}")
    gaps = unpack_bits(as_tensor(packed), count, 32).long()
    indices = (gaps + 1).cumsum(0) - 1
    if indices[-1] >= total:
        raise PayloadError(f"indices: expected ascending values below {total}")
    return indices


class Stage(ABC):
    """Base class of stages of compression.

    Vectors have shape `[n]`. The layout of a vector consists of the shapes of the tensors that are
    concatenated in the vector, none of which is empty.

    Attributes:
        sorts: Meanings of numbers to which the stage applies (see `Sort`).
        biased: Whether the sender must store the values that the stage omits and add the stored
            values to the next message (error feedback).
    """

    sorts: ClassVar[frozenset[Sort]] = frozenset(SORTS)
    biased: ClassVar[bool] = False

    def compresses(self, layout: Layout) -> bool:
        """Return whether the stage changes a vector with the given layout.

        The result depends only on the layout. The sender and the receiver therefore obtain the same
        result.
        """
        return True

    def reduced_layout(self, layout: Layout) -> Layout:
        """Return the layout of the compressed vector.

        Args:
            layout: Layout of the uncompressed vector.
        """
        return layout

    @abstractmethod
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        """Compress a vector.

        If the vector contains a value that is not finite, the decompressed vector also contains
        one.

        Args:
            numbers: The vector.
            layout: Layout of the vector.
            draw: Function that returns a random generator for a label.

        Returns:
            The compressed vector with the name "values", and further vectors for the receiver.
        """

    @abstractmethod
    def decompress(
        self, tensors: Tensors, layout: Layout, dtype: torch.dtype, draw: Draw
    ) -> Tensor:
        """Decompress a vector.

        Args:
            tensors: Received vectors, keyed by name, which may be untrusted. The vectors of this
                stage are removed.
            layout: Layout of the uncompressed vector.
            dtype: Data type of the uncompressed vector.
            draw: Function that returns a random generator for a label.

        Raises:
            PayloadError: If the vectors are malformed.
        """


@dataclass(frozen=True)
class TopClasses(Stage):
    """Stage that keeps the k largest values of each prediction and the mean of the other values.

    Predictions of shape `[N, C]` are reduced to shape `[N, k + 1]`. Decompression preserves the sum
    of each row. Predictions are computed again in each round, so omitted values need not be sent
    later.

    Attributes:
        k: Number of classes to keep.
    """

    k: int

    sorts = frozenset({"predictions"})

    @override
    def compresses(self, layout: Layout) -> bool:
        return len(layout) == 1 and len(layout[0]) == 2 and self.k + 1 < layout[0][1]

    @override
    def reduced_layout(self, layout: Layout) -> Layout:
        ((n, _),) = layout
        return ((n, self.k + 1),)

    @staticmethod
    def _class_bits(num_classes: int) -> int:
        return next(bits for bits in WIDTHS if num_classes <= 2**bits)

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        ((n, classes),) = layout
        rows = numbers.view(n, classes)
        top_classes = rows.topk(self.k).indices.sort(-1).values
        top = rows.gather(1, top_classes)
        rest = rows.scatter(1, top_classes, 0).sum(1, keepdim=True) / (classes - self.k)
        packed = pack_bits(top_classes.reshape(-1), self._class_bits(classes))
        return {"values": torch.cat([top, rest], 1).reshape(-1), "classes": packed}

    @override
    def decompress(
        self, tensors: Tensors, layout: Layout, dtype: torch.dtype, draw: Draw
    ) -> Tensor:
        ((n, classes),) = layout
        unpacked = take_packed(tensors, "classes", n * self.k, self._class_bits(classes))
        top_classes = unpacked.long().view(n, self.k)
        if bool((top_classes >= classes).any()) or bool((top_classes.diff(dim=1) < 1).any()):
            raise PayloadError(f"classes of a row: expected ascending values below {classes}")
        rows = take(tensors, "values", dtype, n * (self.k + 1)).view(n, self.k + 1)
        rest = rows[:, -1:].expand(n, classes)
        return rest.scatter(1, top_classes, rows[:, :-1]).reshape(-1)


@dataclass(frozen=True)
class HalfPrecision(Stage):
    """Stage with IEEE half precision, which has 11 significant bits per number.

    Each tensor is first multiplied by a power of two, so that the largest magnitude is close to the
    maximum of half precision. Without this factor, small updates would be rounded to zero, and sums
    of many rows could overflow.
    """

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        halves = []
        shifts = []
        for part in split_vector(numbers, layout):
            exponent = math.frexp(float(part.abs().amax()))[1]
            shifts.append(max(-MAX_SHIFT, min(MAX_SHIFT, 15 - exponent)))
            halves.append((part * 2.0 ** shifts[-1]).half().reshape(-1))
        # As integers, the numbers are not checked twice.
        values = torch.cat(halves).view(torch.int16)
        return {"values": values, "shifts": torch.tensor(shifts, dtype=torch.int8)}

    @override
    def decompress(
        self, tensors: Tensors, layout: Layout, dtype: torch.dtype, draw: Draw
    ) -> Tensor:
        shifts = take(tensors, "shifts", torch.int8, len(layout)).tolist()
        values = take(tensors, "values", torch.int16, num_values(layout))
        numbers = values.view(torch.float16).to(dtype)
        for part, shift in zip(split_vector(numbers, layout), shifts, strict=True):
            part.mul_(2.0**-shift)
        return numbers


@dataclass(frozen=True)
class Quantize(Stage):
    """Stage that quantizes numbers to equidistant levels between -m and m.

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
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        codes = torch.empty(len(numbers), dtype=torch.uint8 if self.bits <= 8 else torch.int32)
        chance = (
            None
            if self.nearest
            else torch.rand(len(numbers), generator=draw("quantize"), dtype=numbers.dtype)
        )
        scales = []
        at = 0
        for part in split_vector(numbers, layout):
            size = part.abs()
            scales.append(size.mean() if self.nearest and self.bits == 1 else size.amax())
            scale = torch.where(scales[-1] > 0, scales[-1], torch.ones_like(scales[-1]))
            normalized = part.div(scale).view(-1)
            here = slice(at, at := at + len(normalized))
            codes[here] = self._encode_levels(normalized, None if chance is None else chance[here])
        return {"values": pack_bits(codes, self.bits), "scales": torch.stack(scales)}

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
    def decompress(
        self, tensors: Tensors, layout: Layout, dtype: torch.dtype, draw: Draw
    ) -> Tensor:
        scales = take(tensors, "scales", dtype, len(layout))
        numbers = take_packed(tensors, "values", num_values(layout), self.bits).to(dtype)
        numbers = (
            numbers.mul_(2).sub_(1)
            if self.bits == 1
            else numbers.sub_(self._max_level).div_(self._max_level)
        )
        for part, scale in zip(split_vector(numbers, layout), scales, strict=True):
            part.mul_(scale)
        return numbers

    @property
    def _max_level(self) -> int:
        """The integer of the highest level. The lowest level is `-_max_level`."""
        return 2 ** (self.bits - 1) - 1


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
        return max(1, math.ceil(self.amount * total))

    @override
    def compresses(self, layout: Layout) -> bool:
        return self.num_kept(num_values(layout)) < num_values(layout)

    @override
    def reduced_layout(self, layout: Layout) -> Layout:
        return ((self.num_kept(num_values(layout)),),)

    @override
    def decompress(
        self, tensors: Tensors, layout: Layout, dtype: torch.dtype, draw: Draw
    ) -> Tensor:
        total = num_values(layout)
        indices = self.received_indices(tensors, total, draw)
        numbers = take(tensors, "values", dtype, len(indices))
        return numbers.new_zeros(total).scatter_(0, indices, numbers)

    @abstractmethod
    def received_indices(self, tensors: Tensors, total: int, draw: Draw) -> Tensor:
        """Return the indices of the received numbers.

        Args:
            tensors: Received vectors, keyed by name. The vectors with indices are removed.
            total: Length of the uncompressed vector.
            draw: Function that returns a random generator for a label.

        Raises:
            PayloadError: If the vectors are malformed.
        """


@dataclass(frozen=True)
class TopK(SparseStage):
    """Stage that keeps the k numbers of largest magnitude and their indices (Stich et al. 2018).

    It applies to changes of parameters only. Predictions and class sums stay complete.

    The size of compressed indices depends on the indices and is largest if they are spread
    uniformly.

    Attributes:
        is_worst_case: Whether to send uniformly spread indices, which are compressed less well.
    """

    is_worst_case: bool = False

    biased = True

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        k = self.num_kept(len(numbers))
        strategy = zlib.Z_HUFFMAN_ONLY if self.is_worst_case else zlib.Z_RLE
        indices = (
            random_indices(len(numbers), k, seed=0)
            if self.is_worst_case
            else largest_indices(numbers, k)
        )
        return {"values": numbers[indices], "indices": compress_indices(indices, strategy)}

    @override
    def received_indices(self, tensors: Tensors, total: int, draw: Draw) -> Tensor:
        compressed = tensors.pop("indices", torch.empty(0))
        return decompress_indices(compressed, self.num_kept(total), total)


@dataclass(frozen=True)
class RandomK(SparseStage):
    """Stage that keeps k of n numbers, which are selected uniformly at random.

    The kept numbers are divided by the sampling rate k / n, so that the expected value of the
    decompressed vector is the vector itself. The sender and the receiver draw the same indices from
    generators with the same seed. The indices are therefore not sent.
    """

    @override
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> Tensors:
        indices = self.received_indices({}, len(numbers), draw)
        return {"values": numbers[indices] * (len(numbers) / len(indices))}

    @override
    def received_indices(self, tensors: Tensors, total: int, draw: Draw) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (1,), generator=draw("randk")))
        return random_indices(total, self.num_kept(total), seed)


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
STAGE_TYPES: dict[str, Callable[[StageConfig], Stage]] = {
    "topk": lambda c: TopK(c.topk or 0),
    "randk": lambda c: RandomK(c.randk or 0),
    "top_classes": lambda c: TopClasses(c.top_classes or 0),
    "quantize": lambda c: Quantize(c.quantize or 0),
    "half": lambda _: HalfPrecision(),
}


def build_stages(chain: Sequence[StageConfig]) -> tuple[Stage, ...]:
    """Return the stages of a configured chain, in order."""
    return tuple(STAGE_TYPES[stage.kind](stage) for stage in chain)


def with_worst_case_size(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return stages whose message size does not depend on values and is the maximum size."""
    return tuple(
        replace(stage, is_worst_case=True) if isinstance(stage, TopK) else stage for stage in stages
    )
