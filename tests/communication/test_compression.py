"""Compression stages within their error bounds, equal at both ends, and packing in few bits."""

from __future__ import annotations

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from hetero_fl.communication.compression import (
    WIDTHS,
    HalfPrecision,
    Quantize,
    RandomK,
    Stage,
    TopClasses,
    TopK,
    compress_indices,
    decompress_indices,
    pack_bits,
    unpack_bits,
    with_worst_case_size,
)
from hetero_fl.communication.compressor import TensorGroup
from hetero_fl.core.payload import Item, PayloadError
from hetero_fl.utils.seeding import keyed_generator
from tests.support.cases import each_case

LAYOUT = ((4, 30), (20,), ())


def vector(seed: int = 0, n: int = 141) -> Tensor:
    return torch.randn(n, generator=keyed_generator(seed)) * torch.linspace(0.01, 3, n)


def group_of(stages: list[Stage], numbers: Tensor, layout=LAYOUT) -> tuple[TensorGroup, Item]:
    """Return the group of the tensors that are concatenated in a vector, and their item."""
    parts = numbers.clone().split([math.prod(shape) for shape in layout])
    tensors = {
        str(i): p.view(shape) for i, (p, shape) in enumerate(zip(parts, layout, strict=True))
    }
    item = Item(tensors, kind="update")
    return TensorGroup.from_item(stages, list(tensors), item), item


def there_and_back(numbers: Tensor, stages: list[Stage], seed: int = 0, layout=LAYOUT) -> Tensor:
    def draw(label: str) -> torch.Generator:
        return keyed_generator(seed, label)

    group, item = group_of(stages, numbers, layout)
    sent, _ = group.compress(item.tensors, {}, draw)
    back = group.decompress(sent, numbers.dtype, draw)
    assert not sent
    assert back.shape == numbers.shape and back.dtype == numbers.dtype
    return back


def mean_and_error(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(draws).double()
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(draws))


@each_case("stages", [[RandomK(0.2)], [RandomK(0.2), Quantize(4)], [Quantize(1)], [Quantize(2)]])
def test_unbiased_stages_have_the_vector_as_mean(stages: list[Stage]) -> None:
    numbers = vector()
    mean, error = mean_and_error([there_and_back(numbers, stages, seed) for seed in range(2000)])
    off = (mean - numbers).abs() / error.clamp(min=1e-9)
    # A value on a quantization level is exact.
    fixed = error < 1e-9
    assert torch.allclose(mean[fixed], numbers[fixed].double(), atol=1e-6)
    # In standard errors.
    assert off[~fixed].max() < 4.5 and off[~fixed].square().mean().sqrt() < 1.25


def test_random_k_keeps_its_share_uniformly() -> None:
    numbers, n = torch.ones(141), 141
    sent = torch.stack([there_and_back(numbers, [RandomK(28)], seed) for seed in range(2000)])
    assert ((sent > 0).sum(1) == 28).all() and torch.allclose(sent[sent > 0], torch.tensor(n / 28))
    share = (sent > 0).double().mean(0)
    assert (share - 28 / n).abs().max() < 5 * math.sqrt(28 / n * (1 - 28 / n) / 2000)


def test_chain_decodes_stages_in_reverse_order() -> None:
    # Three classes and the mean of the others remain, and then two of four numbers per row.
    rows = torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0, 3.0], [0.0, 2.0, 0.0, 5.0, 0.0, 0.0]])

    back = there_and_back(rows.reshape(-1), [TopClasses(3), TopK(4)], layout=((2, 6),))

    assert torch.equal(back.view(2, 6), rows)


@each_case("bits", [2, 4, 8, 16])
def test_quantized_values_are_within_one_level(bits: int) -> None:
    numbers = vector()
    for stochastic in (True, False):
        back = there_and_back(numbers, [Quantize(bits, nearest=not stochastic)])
        for p, g in zip(numbers.split([120, 20, 1]), back.split([120, 20, 1]), strict=True):
            level = p.abs().max() / (2 ** (bits - 1) - 1)
            allowed = level * (1 if stochastic else 0.5001) + 1e-6 * p.abs().max()
            assert (p - g).abs().max() <= allowed
            assert g[p.abs().argmax()] == p[p.abs().argmax()]


def test_rounding_residual_is_exact() -> None:
    """Move both half-way points around a power of two bit by bit."""
    for bits in (2, 4, 8, 16):
        for moved in range(-12, 13):
            most = (torch.tensor([2.0 ** (bits - 1) - 1]).view(torch.int32) + moved).view(
                torch.float32
            )
            steps = (
                torch.tensor([0.5]).view(torch.int32) + torch.arange(-24, 25, dtype=torch.int32)
            ).view(torch.float32)
            numbers = torch.cat([most, steps, -steps, steps + 1])
            back = there_and_back(
                numbers, [TopK(147), Quantize(bits, nearest=True)], layout=((148,),)
            )
            assert torch.equal((numbers - back).double(), numbers.double() - back.double())


def test_quantization_uses_the_configured_bits() -> None:
    numbers = vector(n=1000)
    for bits in (1, 2, 4, 8, 16):
        sent = Quantize(bits).compress(numbers, ((1000,),), lambda label: keyed_generator(0))
        assert sum(tensor.nbytes for tensor in sent.values()) == 4 + math.ceil(1000 * bits / 8)


def test_zero_and_one_are_exact() -> None:
    known = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(6)
    for bits in (2, 4, 8, 16):
        assert torch.equal(there_and_back(known, [Quantize(bits)], layout=((24,),)), known)
    still = torch.zeros(24)
    for stage in (Quantize(1), Quantize(8), HalfPrecision(), TopK(3)):
        assert torch.equal(there_and_back(still, [stage], layout=((4, 6),)), still)


@each_case("scale", [1e-12, 1e-4, 1.0, 1e9])
def test_half_precision_keeps_eleven_bits(scale: float) -> None:
    numbers = vector() * scale
    back = there_and_back(numbers, [HalfPrecision()])
    big = numbers.abs() > numbers.abs().max() * 1e-3
    assert ((back - numbers).abs()[big] <= numbers.abs()[big] * 2.0**-11).all()


def test_topk_sends_the_largest_values() -> None:
    numbers = vector()
    for amount, k in ((0.1, 15), (9, 9), (1, 1), (500, 141)):
        back = there_and_back(numbers, [TopK(amount)])
        kept = numbers.abs().argsort(descending=True)[:k]
        assert torch.equal(back[kept], numbers[kept]) and int((back != 0).sum()) == k


def test_top_classes_keep_largest_values_and_row_sums() -> None:
    rows = torch.randn(30, 10, generator=keyed_generator(4)).softmax(-1)
    back = there_and_back(rows.reshape(-1), [TopClasses(3)], layout=((30, 10),)).view(30, 10)
    top = rows.topk(3).indices
    assert torch.equal(back.gather(1, top), rows.gather(1, top))
    assert torch.allclose(back.sum(1), torch.ones(30), atol=1e-6)
    others = back.scatter(1, top, float("nan"))
    spread = others.nan_to_num(-9).amax(1) - others.nan_to_num(9).amin(1)
    assert torch.equal(spread, torch.zeros(30))


@each_case(
    ("stage", "bad"),
    itertools.product(
        [
            Quantize(1),
            Quantize(4),
            Quantize(8, nearest=True),
            HalfPrecision(),
            TopK(9),
        ],
        [float("nan"), float("inf")],
    ),
)
def test_non_finite_values_stay_non_finite(stage: Stage, bad: float) -> None:
    numbers = vector()
    numbers[37] = bad
    assert not torch.isfinite(there_and_back(numbers, [stage])).all()


@each_case(("bits", "count"), itertools.product(WIDTHS, [1, 7, 8, 9, 1000]))
def test_packed_fields_round_trip_in_minimal_size(bits: int, count: int) -> None:
    values = torch.randint(2**bits, (count,), generator=keyed_generator(bits * count))
    values[0] = 2**bits - 1
    packed = pack_bits(values, bits)
    assert packed.nbytes == math.ceil(bits * count / 8)
    assert torch.equal(unpack_bits(packed, count, bits).long(), values)


def test_packed_bits_match_loop() -> None:
    values, bits = [5, 0, 15, 3, 1, 6, 2], 4
    expected = sum(v << (bits * i) for i, v in enumerate(values)).to_bytes(4, "little")
    assert pack_bits(torch.tensor(values), bits).tolist() == list(expected)


def spread_indices(total: int, count: int, seed: int) -> Tensor:
    indices = np.random.default_rng(seed).choice(total, count, replace=False)
    return torch.from_numpy(np.sort(indices))


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_indices_round_trip(total: int, share: float, seed: int) -> None:
    indices = spread_indices(total, max(1, int(share * total)), seed)

    compressed = compress_indices(indices)

    assert torch.equal(decompress_indices(compressed, len(indices), total), indices)


def test_packed_indices_are_close_to_their_entropy() -> None:
    total, count = 1_000_000, 10_000
    entropy = (
        (math.lgamma(total + 1) - math.lgamma(count + 1) - math.lgamma(total - count + 1))
        / math.log(2)
        / 8
    )
    size = len(compress_indices(spread_indices(total, count, 0)))
    assert entropy < size < 1.08 * entropy
    near = spread_indices(total // 20, count, 1)
    assert len(compress_indices(near)) < 0.5 * size


def test_largest_size_of_topk_bounds_its_size() -> None:
    def size(stage: Stage, numbers: Tensor) -> int:
        sent = stage.compress(numbers, ((len(numbers),),), keyed_generator)
        return sum(tensor.nbytes for tensor in sent.values())

    for amount, n in itertools.product((0.001, 0.01, 0.1, 0.5), (200, 5000, 300_000)):
        stage = TopK(amount)
        (largest,) = with_worst_case_size([stage])
        most = size(largest, vector(n=n))
        for numbers in (vector(n=n), torch.randn(n, generator=keyed_generator(n))):
            assert most >= size(stage, numbers)


def test_invalid_indices_are_refused() -> None:
    compressed = compress_indices(torch.cat([torch.arange(400), torch.tensor([9900])]))
    with pytest.raises(PayloadError, match="ascending values below 9900"):
        decompress_indices(compressed, 401, 9900)
    for count in (400, 402):
        with pytest.raises(PayloadError):
            decompress_indices(compressed, count, 10_000)
    for cut in range(len(compressed)):
        with pytest.raises(PayloadError):
            decompress_indices(compressed[:cut], 401, 10_000)
    with pytest.raises(PayloadError, match="cannot be decompressed"):
        decompress_indices(compressed ^ 255, 401, 10_000)


def test_oversized_indices_are_not_decompressed() -> None:
    bomb = torch.tensor(list(zlib.compress(bytes(10**7))), dtype=torch.uint8)
    with pytest.raises(PayloadError, match="indices: expected 4"):
        decompress_indices(bomb, 4, 100)


@each_case(
    "stages",
    [[TopK(9)], [RandomK(9)], [Quantize(4)], [HalfPrecision()], [TopClasses(2)], []],
)
def test_malformed_vectors_are_refused(stages: list[Stage]) -> None:
    group, item = group_of(stages, vector(), ((3, 47),))
    sent, _ = group.compress(item.tensors, {}, keyed_generator)
    values = sent.pop("values")
    for wrong in ({}, {"values": values[1:]}, {"values": values[None]}, {"values": values > 0}):
        with pytest.raises(PayloadError, match="values: "):
            group.decompress({**sent, **wrong}, torch.float32, keyed_generator)
