"""Stages of compression: top-k, quantization, half precision, low rank, top classes."""

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

# Matrices as sums of few rank-one terms: a truncated SVD that keeps a share of the energy (Wu et
# al. 2022, FedKD, eq. 8).
#
# A tensor of two dimensions or more is a matrix `[m, n]`: its first dimension against all others (a
# convolution's output channels against the rest). Vectors are few numbers, and stay as they are. A
# matrix travels as one tensor `[k, m + n]` whose rows are the terms, the singular value in the left
# one; where k terms would be no smaller than the matrix, as its own numbers in rows of m + n,
# padded with nought. The number of rows tells which: terms are used only where there are fewer.


def compress_low_rank(tensors: Mapping[str, Tensor], energy: float) -> Tensors:
    """Each matrix by the fewest terms whose squared singular values sum to at least `energy` (0 to 1) of the whole, at least
    one. Above 1 no terms suffice, and all travel as their own numbers: the most that it can be. Values must be finite."""
    return {
        n: _terms(t.reshape(len(t), -1), energy) if t.ndim > 1 else t for n, t in tensors.items()
    }


def reconstruct_low_rank(packed: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensors:
    """The reverse of `compress`, in the shapes of `like`. Any `[k, m + n]` has a meaning."""
    return {n: _matrix(t, like[n]) if like[n].ndim > 1 else t for n, t in packed.items()}


def widest_packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a packed matrix (a tensor of this shape, of two dimensions or more) that holds its own numbers: the most
    rows that it can have, and their width."""
    m = shape[0]
    n = math.prod(shape[1:])
    return _num_packed_rows(m, n), m + n


def _num_packed_rows(m: int, n: int) -> int:
    """Rows of m + n that hold m · n numbers."""
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


# What a stage of the channel is: numbers in, fewer numbers and some bytes out; or, at the end of a
# chain, bytes.

# What the numbers of an item are: a model's change, a model as it is, a prediction a row, other rows or sums by class.
Sort = Literal["change", "whole", "predictions", "rows"]
Layout = tuple[tuple[int, ...], ...]  # the shapes of tensors that lie end to end in one vector
Draw = Callable[[str], torch.Generator]  # by label; both ends draw the same


def num_values(layout: Layout) -> int:
    """Numbers in a vector of that layout."""
    return sum(map(prod, layout))


def split_vector(numbers: Tensor, layout: Layout) -> Iterator[Tensor]:
    """The vector's tensors, as views in their shapes."""
    for flat, shape in zip(numbers.split([prod(shape) for shape in layout]), layout, strict=True):
        yield flat.view(shape)


def read_numbers(source: ByteReader, count: int, dtype: torch.dtype) -> Tensor:
    """Return the next numbers of a floating type. Raises PayloadError if there are fewer."""
    kind = np.dtype(str(dtype).removeprefix("torch."))
    return torch.from_numpy(np.frombuffer(bytearray(source.take(count * kind.itemsize)), kind))


class Stage(ABC):
    """Leaves numbers out. `numbers` is always one vector `[n]` of a floating type, in the order of `layout`."""

    sorts: ClassVar[frozenset[Sort]]
    # whether what it leaves out is missing in the mean, too: the sender then keeps it for later
    biased: ClassVar[bool]

    def with_worst_case_size(self) -> Stage:
        """The stage as a bound on its bytes takes it: itself, where what it sends is as long whatever the numbers."""
        return self

    @abstractmethod
    def compresses(self, layout: Layout) -> bool:
        """Whether it leaves anything out of such a vector; asked at both ends."""

    @abstractmethod
    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        """What is left, its layout, and what the receiver has to be told besides."""

    @abstractmethod
    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        """At the receiver: the layout of what was left, and what `decompress` needs. Raises PayloadError."""

    @abstractmethod
    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        """A vector of `layout` from what was left of it."""


class NumberFormat(ABC):
    """Writes numbers; the end of a chain."""

    sorts: ClassVar[frozenset[Sort]] = frozenset({"change", "whole", "predictions", "rows"})

    @abstractmethod
    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        """The numbers as bytes. What is not finite is written as something that is not finite when it is read."""

    @abstractmethod
    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The reverse of `encode`. Raises PayloadError."""


# The likeliest classes of each prediction.


@dataclass(frozen=True)
class TopClasses(Stage):
    """Of each row `[C]` the k largest numbers with their classes, and the mean of all others in place of those: the sum of a row
    stays what it was. `[N, C]` becomes `[N, k + 1]`."""

    k: int

    sorts = frozenset({"predictions"})
    biased = False  # predictions are said anew each round: there is nothing to make up for

    def compresses(self, layout: Layout) -> bool:
        return len(layout) == 1 and len(layout[0]) == 2 and self.k + 1 < layout[0][1]

    @staticmethod
    def _class_bits(classes: int) -> int:
        return (classes - 1).bit_length()

    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        ((n, classes),) = layout
        rows = numbers.view(n, classes)
        which = rows.topk(self.k).indices.sort(-1).values
        top = rows.gather(1, which)
        rest = rows.scatter(1, which, 0).sum(1, keepdim=True) / (classes - self.k)
        told = pack_bits(which.reshape(-1).numpy(), self._class_bits(classes))
        return torch.cat([top, rest], 1).reshape(-1), ((n, self.k + 1),), told

    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        ((n, classes),) = layout
        which = (
            torch.from_numpy(unpack_bits(source, n * self.k, self._class_bits(classes)))
            .long()
            .view(n, self.k)
        )
        if bool((which >= classes).any()) or bool((which.diff(dim=1) < 1).any()):
            raise PayloadError(f"classes of a row that are not ascending below {classes}")
        return ((n, self.k + 1),), which

    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        ((n, classes),) = layout
        said = numbers.view(n, self.k + 1)
        return (
            said[:, -1:].expand(n, classes).scatter(1, side_information, said[:, :-1]).reshape(-1)
        )


# Half precision: 11 significant bits of each number, whatever its size.

FAR = 126  # exponents of two that float32 has on either side


@dataclass(frozen=True)
class HalfPrecision(NumberFormat):
    """IEEE half precision, each tensor multiplied by a power of two first that brings its largest number near the upper end:
    otherwise small changes would be rounded to nought, and sums of many rows overflow."""

    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        halves = torch.empty(len(numbers), dtype=torch.float16)
        shifts = []
        at = 0
        for part in split_vector(numbers, layout):
            most = float(part.abs().amax()) if part.numel() else 0.0
            shift = max(-FAR, min(FAR, 15 - int(np.frexp(most)[1]))) if np.isfinite(most) else 0
            halves[at : (at := at + part.numel())] = part.reshape(-1) * 2.0**shift
            shifts.append(shift)
        return np.array(shifts, np.int8).tobytes() + halves.numpy().tobytes()

    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        shifts = np.frombuffer(source.take(len(layout)), np.int8).tolist()
        numbers = torch.from_numpy(
            np.frombuffer(bytearray(source.take(2 * num_values(layout))), "<f2")
        ).to(dtype)
        for part, shift in zip(split_vector(numbers, layout), shifts, strict=True):
            part.mul_(2.0 ** -max(-FAR, min(FAR, shift)))
        return numbers


@dataclass(frozen=True)
class FullPrecision(NumberFormat):
    """All bits of each number: the end of a chain that names no other."""

    def encode(self, numbers: Tensor, layout: Layout, draw: Draw) -> bytes:
        return numbers.numpy().tobytes()

    def decode(self, source: ByteReader, layout: Layout, dtype: torch.dtype) -> Tensor:
        return read_numbers(source, num_values(layout), dtype)


# Matrices of a change as few rank-one terms (Wu et al. 2022, FedKD's energy rule).

WHOLE = 2.0  # an energy that no truncation keeps: the most that it can be


@dataclass(frozen=True)
class LowRank(Stage):
    """The fewest terms with that share of the energy, for each matrix by itself; vectors are sent as they are."""

    energy: float

    sorts = frozenset({"change"})
    biased = True

    def with_worst_case_size(self) -> LowRank:
        return LowRank(WHOLE)

    def compresses(self, layout: Layout) -> bool:
        return any(len(shape) > 1 for shape in layout)

    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        # no factorisation: told from its values
        energy = self.energy if bool(torch.isfinite(numbers).all()) else WHOLE
        packed = compress_low_rank(
            {str(i): part for i, part in enumerate(split_vector(numbers, layout))}, energy
        )
        left = tuple(tuple(t.shape) for t in packed.values())
        rows = b"".join(
            shape[0].to_bytes(4, "little")
            for shape, was in zip(left, layout, strict=True)
            if len(was) > 1
        )
        return torch.cat([t.reshape(-1) for t in packed.values()]), left, rows

    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        left: list[tuple[int, ...]] = []
        for shape in layout:
            if len(shape) > 1:
                most, width = widest_packed_shape(shape)
                rows = source.read_integer(4)
                if not 1 <= rows <= most:
                    raise PayloadError(f"{rows} terms of a matrix that {most} hold whole")
                left.append((rows, width))
            else:
                left.append(shape)
        return tuple(left), tuple(left)

    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        packed = {str(i): part for i, part in enumerate(split_vector(numbers, side_information))}
        like = {str(i): numbers.new_empty(shape) for i, shape in enumerate(layout)}
        return torch.cat([t.reshape(-1) for t in reconstruct_low_rank(packed, like).values()])


# Numbers in few bits: levels at equal distances between −m and m, m being the largest size of those
# that share a scale.


@dataclass(frozen=True)
class Quantize(NumberFormat):
    """b bits: 2^b − 1 levels, nought among them; one bit: the sign (Alistarh et al. 2017, QSGD, with the largest size as norm).

    Rounded up or down at random, so that the mean over draws is the number itself. `nearest`, in a chain whose sender keeps what
    was not sent: to the nearest level, which from two bits on leaves a remainder that is exact in floating point (Sterbenz's
    lemma); one bit is then the sign times the mean size, as the largest would overshoot most numbers by far.
    """

    bits: int
    bucket: int | None = None
    nearest: bool = False

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
            share = block.div(scale[:, None]).view(-1)  # in [−1, 1]
            here = slice(at, at := at + len(share))
            codes[here] = self._encode_levels(share, None if chance is None else chance[here])
        return torch.cat(scales).numpy().tobytes() + pack_bits(codes.numpy(), self.bits)

    def _encode_levels(self, share: Tensor, chance: Tensor | None) -> Tensor:
        """The levels next to numbers in [−1, 1], counted from the lowest."""
        if self.bits == 1:
            level = share.add_(1).div_(2)
            level = (
                (level >= 0.5).to(share.dtype) if chance is None else level.add_(chance).floor_()
            )
            return level.nan_to_num_(0).clamp_(0, 1)
        level = share.mul_(self._max_level)
        level = level.round_() if chance is None else level.add_(chance).floor_()
        return level.nan_to_num_(0).clamp_(-self._max_level, self._max_level).add_(self._max_level)

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
        """The highest level; the lowest is its opposite."""
        return max(1, 2 ** (self.bits - 1) - 1)

    def _block_shapes(self, layout: Layout) -> Iterator[tuple[int, int]]:
        """How the vector is cut: rows, of so many numbers, that have a scale each."""
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


# Few of the numbers of a change: the largest, or some drawn by a key; the others are nought at the
# receiver.


@dataclass(frozen=True)
class SparseStage(Stage):
    """`amount`: a share of the numbers below 1, or how many of them; at least one, over all tensors of an item together."""

    amount: float

    sorts = frozenset({"change"})

    def num_kept(self, total: int) -> int:
        """How many numbers of so many are sent."""
        return (
            max(1, ceil(self.amount * total)) if self.amount < 1 else min(int(self.amount), total)
        )

    def compresses(self, layout: Layout) -> bool:
        return self.num_kept(num_values(layout)) < num_values(layout)

    def decompress(self, numbers: Tensor, layout: Layout, side_information: Any) -> Tensor:
        # zero but for these numbers at these places
        return numbers.new_zeros(num_values(layout)).scatter_(0, side_information, numbers)


@dataclass(frozen=True)
class TopK(SparseStage):
    """The k largest in size, with their indices (Stich et al. 2018). `entropy`: these coded, where that is shorter."""

    entropy: bool = False

    biased = True

    def with_worst_case_size(self) -> TopK:
        return TopK(self.amount)

    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        k = self.num_kept(len(numbers))
        indices = largest_indices(numbers, k)
        return numbers[indices], ((k,),), write_indices(indices.numpy(), len(numbers), self.entropy)

    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        k = self.num_kept(num_values(layout))
        return ((k,),), torch.from_numpy(read_indices(source, k, num_values(layout)))


@dataclass(frozen=True)
class RandomK(SparseStage):
    """Keep k of n numbers, drawn from a key that both ends know, so that no index travels.

    Attributes:
        scaled: Divide the kept numbers by the sampling rate k/n, so that the mean over draws is the
            vector itself. Off where what is left out is part of the next message.
    """

    scaled: bool = True

    @property
    def biased(self) -> bool:  # type: ignore[override]  # of the others it is a constant
        return not self.scaled

    def _draw_indices(self, total: int, draw: Draw) -> Tensor:
        seed = int(torch.randint(2**63 - 1, (1,), generator=draw("randk")))
        chosen = np.random.default_rng(seed).choice(
            total, self.num_kept(total), replace=False, shuffle=False
        )
        chosen.sort()
        return torch.from_numpy(chosen)

    def compress(self, numbers: Tensor, layout: Layout, draw: Draw) -> tuple[Tensor, Layout, bytes]:
        indices = self._draw_indices(len(numbers), draw)
        kept = numbers[indices]
        if self.scaled:
            kept = kept * (len(numbers) / len(indices))
        return kept, ((len(indices),),), b""

    def decode_side_information(
        self, source: ByteReader, layout: Layout, draw: Draw
    ) -> tuple[Layout, Any]:
        return ((self.num_kept(num_values(layout)),),), self._draw_indices(num_values(layout), draw)


def largest_indices(numbers: Tensor, k: int) -> Tensor:
    """Ascending indices of the k numbers of largest size, int64. Of equal ones any, but always the same."""
    size = numbers.abs().numpy()
    indices = np.argpartition(size, len(size) - k)[len(size) - k :]
    indices.sort()
    return torch.from_numpy(indices)


# The stages of the channel, from the configuration.

STAGE_TYPES: dict[str, Callable[[StageConfig, bool], Stage | NumberFormat]] = {
    "topk": lambda c, entropy: TopK(c.topk or 0, entropy),
    "randk": lambda c, entropy: RandomK(c.randk or 0),
    "lowrank": lambda c, entropy: LowRank(c.lowrank or 0),
    "top_classes": lambda c, entropy: TopClasses(c.top_classes or 0),
    "quantize": lambda c, entropy: Quantize(c.quantize or 0, c.bucket),
    "half": lambda c, entropy: HalfPrecision(),
}


def with_worst_case_size(
    stages: Sequence[Stage | NumberFormat],
) -> tuple[Stage | NumberFormat, ...]:
    """A chain whose messages are as long as those of this one can be, and whose lengths do not depend on the numbers."""
    return tuple(
        stage.with_worst_case_size() if isinstance(stage, Stage) else stage for stage in stages
    )


def build_stages(
    chain: Sequence[StageConfig], entropy: bool, has_feedback: bool = False
) -> tuple[Stage | NumberFormat, ...]:
    """Return the stages of a configured chain, in its order.

    Args:
        chain: The configuration.
        entropy: Code indices, where that makes them shorter.
        has_feedback: Whether what is left out is part of the next message. Kept values are then
            not divided by the sampling rate.
    """
    stages = tuple(STAGE_TYPES[stage.kind](stage, entropy) for stage in chain)
    if not has_feedback:
        return stages
    return tuple(replace(s, scaled=False) if isinstance(s, RandomK) else s for s in stages)
