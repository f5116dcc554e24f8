"""Dropout whose masks follow from the seed of a step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from hetero_fl.engine.batches import GOLDEN
from hetero_fl.engine.dropout import DropoutStreams, KeyedDropout, use_keyed_dropout
from tests.support.cases import each_case

ONES = torch.ones(100, 1000)


def layer(p: float) -> tuple[KeyedDropout, DropoutStreams]:
    streams = DropoutStreams(torch.device("cpu"))
    return KeyedDropout(p, streams), streams


def dropped(key: int, p: float, x: Tensor = ONES, calls: int = 1) -> Tensor:
    dropout, streams = layer(p)
    streams.seed([key])
    return [dropout(x) for _ in range(calls)][-1]


@each_case("p", [0.1, 0.25, 0.5, 0.9])
def test_keyed_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    found = dropped(1, p)

    spread = (p * (1 - p) / found.numel()) ** 0.5
    assert float((found == 0).double().mean()) == pytest.approx(p, abs=4 * spread)
    kept = found[found != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)


def test_elements_are_dropped_independently_of_their_neighbors() -> None:
    zero = (dropped(1, 0.5).flatten() == 0).double() - 0.5

    for distance in range(1, 9):
        correlation = 4 * (zero[distance:] * zero[:-distance]).mean()
        assert abs(float(correlation)) < 4 / len(zero) ** 0.5


def test_keyed_dropout_with_extreme_probabilities() -> None:
    assert not dropped(1, 1.0).any()
    assert torch.equal(dropped(1, 1e-6), ONES)


def test_keyed_dropout_depends_on_seed_and_call() -> None:
    first = dropped(1, 0.5)

    assert torch.equal(first, dropped(1, 0.5))
    assert not torch.equal(first, dropped(1, 0.5, calls=2))
    assert not torch.equal(first, dropped(2, 0.5))


def test_neighboring_steps_have_different_masks() -> None:
    dropout, streams = layer(0.5)
    masks = set()
    for step in range(20):
        streams.seed([7 + step * GOLDEN])
        masks |= {tuple(dropout(torch.ones(64)).tolist()) for _ in range(5)}

    assert len(masks) == 100


def test_dropout_outside_a_training_step_raises() -> None:
    dropout, _ = layer(0.5)

    with pytest.raises(RuntimeError, match="outside a training step"):
        dropout(torch.ones(3))


def test_keyed_dropout_does_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()

    dropped(1, 0.5)

    assert torch.equal(before, torch.get_rng_state())


@each_case("size", [3, 1000])
def test_stacked_masks_equal_those_of_single_participants(size: int) -> None:
    keys = [5, 6, 7]
    sizes = [4, 2, 3]
    dropout, streams = layer(0.3)
    streams.seed(keys, 4)

    def forward(x: Tensor, place: Tensor) -> Tensor:
        with streams.stacked(place):
            return dropout(dropout(x))

    stacked = vmap(forward)(torch.ones(3, 4, size), torch.arange(3))

    for place, (key, rows) in enumerate(zip(keys, sizes, strict=True)):
        single, separate = layer(0.3)
        separate.seed([key], 4)
        expected = single(single(torch.ones(rows, size)))
        assert torch.equal(stacked[place, :rows], expected)


def test_stacked_masks_pass_gradients() -> None:
    dropout, streams = layer(0.5)
    streams.seed([1, 2])
    x = torch.ones(2, 3, 5, requires_grad=True)

    def forward(x: Tensor, place: Tensor) -> Tensor:
        with streams.stacked(place):
            return dropout(x).sum()

    vmap(forward)(x, torch.arange(2)).sum().backward()

    assert set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_nested_dropout_layers_are_replaced() -> None:
    twice = nn.Dropout(0.5)
    inner = nn.Sequential(twice, nn.Linear(2, 2), twice)
    model = nn.Sequential(nn.Linear(2, 2), inner, nn.Dropout(0.0))

    assert use_keyed_dropout(model, DropoutStreams(torch.device("cpu")))
    assert not any(type(m) is nn.Dropout for m in model.modules())
    assert not use_keyed_dropout(
        nn.Sequential(nn.Dropout(0.0)), DropoutStreams(torch.device("cpu"))
    )
