"""The steps of a local fit: their rows, dropout masks, and the modules that compute them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Supervised
from hetero_fl.core.participant import Participant
from hetero_fl.core.plan import Fit, SampledBatches
from hetero_fl.core.task import Task
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.dropout import DropoutStreams, KeyedDropout, use_keyed_dropout
from hetero_fl.engine.templates import Template
from hetero_fl.engine.training import GOLDEN, Batches, index_batches
from tests.support.cases import each_case

STREAM = (0, 3, "site_1", "train", 0)


def fit(**settings: Any) -> Fit:
    return Fit({"model": None}, Supervised(), **settings)


def test_index_batches_reshuffles_rows_in_each_epoch() -> None:
    batches = index_batches(12, fit(batch_size=4, epochs=3), STREAM)

    orders = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_index_batches_of_steps_reshuffle_after_all_rows() -> None:
    order = torch.cat(index_batches(12, fit(batch_size=4, steps=6), STREAM)).tolist()

    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]


def test_index_batches_appends_a_single_last_row_to_the_previous_batch() -> None:
    sizes = [[len(b) for b in index_batches(n, fit(batch_size=4), STREAM)] for n in (1, 9, 10)]

    assert sizes == [[1], [4, 5], [4, 4, 2]]


def test_each_step_has_a_separate_dropout_key() -> None:
    task = Task("multiclass", 2)
    site = Participant(
        "site_1", task, {}, {}, lambda *_: {}, ClientSettings(), lambda: torch.zeros(2)
    )
    rows = SampledBatches(lambda generator, size: {"x": torch.zeros(size)}, 4)

    keys = [
        key for key, _ in Batches(site, fit(data=rows, steps=5), DeviceMemory(torch.device("cpu")))
    ]

    assert len(set(keys)) == 5


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


@pytest.fixture
def template() -> Template:
    return Template(
        ModelSpec.from_config("cnn_bn_small", 10, (1, 8, 8)), DeviceMemory(torch.device("cpu"))
    )


def modes(template: Template) -> set[bool]:
    return {module.training for module in template.module.modules()}


def test_mode_changes_are_passed_to_layers(
    template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[bool] = []
    train = nn.Module.train
    full = template.module
    monkeypatch.setattr(
        nn.Module,
        "train",
        lambda self, mode=True: (self is full and passed.append(mode)) or train(self, mode),
    )
    for training in (True, True, False, False, True):
        template.set_mode(training)
        assert modes(template) == {training}
    # The first call is always passed on, because a module may override `train`.
    assert passed == [True, False, True]


def test_external_mode_change_is_detected(template: Template) -> None:
    template.set_mode(True)
    template.module.eval()
    template.set_mode(True)
    assert modes(template) == {True}
    template.module.eval()
    template.set_mode(False)
    assert modes(template) == {False}


@each_case("name", ["cnn_bn_small", "mlp"])
def test_returned_tensors_are_not_overwritten(name: str) -> None:
    arch = ModelSpec.from_config(name, 10, (1, 8, 8))
    template = Template(arch, DeviceMemory(torch.device("cpu")))
    first, second = (arch.initial_tensors(seed) for seed in (1, 2))
    template.load(first)
    taken = template.release_tensors(template.parameters)
    versions = {n: t._version for n, t in taken.items()}
    parameters = list(template.module.parameters())

    template.load(second)
    # Cached predictions of the returned model remain valid.
    assert {n: t._version for n, t in taken.items()} == versions

    assert all(t.is_contiguous() and not t.requires_grad for t in taken.values())
    assert all(torch.equal(t, first[n]) for n, t in taken.items())
    assert all(torch.equal(t, second[n]) for n, t in template.module.state_dict().items())
    assert all(a is b for a, b in zip(parameters, template.module.parameters(), strict=True))
    # A model may be trained in place again: loading copies into the module's memory.
    again = template.release_tensors(template.parameters)
    template.load(again)
    assert all(
        torch.equal(t, second[n]) for n, t in template.release_tensors(template.parameters).items()
    )


def test_returned_tensors_share_no_memory(template: Template) -> None:
    norms = [m for m in template.module.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].running_var = norms[0].running_mean
    norms[1].running_mean.data = norms[1].running_var.data

    taken = template.release_tensors(template.parameters)
    template.load({n: torch.full_like(t, 5) for n, t in taken.items()})

    assert not any(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in combinations([*taken.values(), *template.tensors.values()], 2)
    )
