"""Batched and serial fits agree in double precision for every option of `Fit`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.clients import AugmentConfig, ClientSettings
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import (
    Batch,
    ModelViews,
    Objective,
    ProxyReplay,
    Supervised,
    TeacherDistillation,
    distillation_loss,
)
from hetero_fl.core.participant import Columns, Participant
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    FitReport,
    Predict,
    Rows,
    SampledBatches,
    Step,
    TensorRows,
)
from hetero_fl.core.task import Task
from hetero_fl.engine import vectorized, vectorized_training
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import DivergedError
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.training import index_batches, step_count
from hetero_fl.engine.vectorized import VectorizedBackend
from hetero_fl.utils.seeding import keyed_generator
from tests.support.cases import each_case

CPU = torch.device("cpu")
# With batches of 8: full, single leftover and short ones; 5, 4, 2, 5 and 3 steps.
SIZES = (40, 33, 17, 40, 21)
TASK = Task("multiclass", 4)
PUBLIC = {"x": torch.rand(24, 1, 8, 8, dtype=torch.float64, generator=keyed_generator("public"))}


@pytest.fixture(autouse=True)
def double(float64: None) -> None:
    """Run this file in double precision."""


def arch(name: str = "cnn", **options: Any) -> ModelSpec:
    return ModelSpec.from_config(name, TASK.outputs, (1, 8, 8), options=options)


SMALL = {"width": 4}


def clients(of: ModelSpec, sizes: tuple[int, ...] = SIZES) -> list[Participant]:
    result = []
    for i, n in enumerate(sizes):
        g = keyed_generator("rows", i)
        columns = {
            "x": torch.rand(n, 1, 8, 8, generator=g),
            "y": torch.randint(TASK.outputs, (n,), generator=g),
        }
        models = {slot: of.initial_tensors(7 + k) for k, slot in enumerate(("model", "other"))}
        result.append(
            Participant(
                participant_id=f"site_{i}",
                task=TASK,
                arch={"model": of, "other": of},
                models=models,
                data=lambda name, through, c=columns: PUBLIC if name == "proxy" else c,
                settings=ClientSettings(),
                label_counts=lambda: torch.zeros(TASK.outputs),
            )
        )
    return result


Make = Callable[[Participant], Step]


def both(of: ModelSpec, make: Make, sizes: tuple[int, ...] = SIZES) -> list[Any]:
    """Return the results after checking that both backends agree on all participants."""
    one, many = clients(of, sizes), clients(of, sizes)
    notes: list[str] = []
    serial, batched = (
        SerialBackend(DeviceMemory(CPU)),
        VectorizedBackend(DeviceMemory(CPU), notes.append),
    )
    expected = serial.run([(p, make(p)) for p in one])
    found = batched.run([(p, make(p)) for p in many])
    assert notes == []
    agree(found, expected)
    agree(
        [(p.models, p.state, p.stream_uses) for p in many],
        [(p.models, p.state, p.stream_uses) for p in one],
    )
    return found


def agree(found: Any, expected: Any) -> None:
    """Compare trees of equal structure with a tolerance of 1e-8."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for k, v in expected.items():
            agree(found[k], v)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            agree(a, b)
    elif isinstance(expected, FitReport):
        assert (found.steps, found.examples) == (expected.steps, expected.examples)
        assert found.loss == pytest.approx(expected.loss, abs=1e-8)
    else:
        assert found == expected


FIT = Fit(
    {"model": None}, Supervised(), batch_size=8, optimizer=OptimizerConfig(name="sgd", lr=0.05)
)
OPTIMIZERS = {
    "sgd": OptimizerConfig(name="sgd", lr=0.05, weight_decay=0.01),
    "nesterov": OptimizerConfig(name="sgd", lr=0.05, momentum=0.9, nesterov=True),
    "adam": OptimizerConfig(lr=0.01, weight_decay=0.01),
    "adamw": OptimizerConfig(name="adamw", lr=0.01, weight_decay=0.1),
    "head": OptimizerConfig(name="sgd", lr=0.05, head_lr=0.5, momentum=0.5),
    "clipped": OptimizerConfig(name="sgd", lr=0.5, clip_norm=0.3),
}


@each_case(("norm", "optimizer"), itertools.product(["batch", "group"], OPTIMIZERS))
def test_every_optimizer_matches_serial_training(optimizer: str, norm: str) -> None:
    fit = replace(FIT, optimizer=OPTIMIZERS[optimizer])
    both(arch(width=4, norm=norm), lambda p: fit)


CASES: dict[str, Make] = {
    "epochs": lambda p: replace(FIT, epochs=3),
    "steps": lambda p: replace(FIT, steps=6),
    "the head alone": lambda p: replace(FIT, train={"model": ("head.",)}),
    "weights of classes": lambda p: replace(
        FIT, context={"class_weights": torch.tensor([1.0, 2.0, 0.5, 1.0])}
    ),
    "own priors": lambda p: replace(
        FIT, context={"log_prior": torch.rand(4, generator=keyed_generator(p.participant_id))}
    ),
    "augmented": lambda p: replace(FIT, augment=AugmentConfig(crop=1, flip=True, rotate=10)),
    "drift": lambda p: replace(
        FIT,
        drift={"model": {"head.bias": torch.rand(4, generator=keyed_generator(p.participant_id))}},
    ),
    "as another": lambda p: replace(FIT, stream_id="other"),
    "annealed": lambda p: replace(FIT, anneal=True),
    "public rows": lambda p: replace(
        FIT,
        objective=TeacherDistillation(),
        data=Rows(
            "proxy",
            extra_columns={
                "teacher": torch.rand(24, 4, generator=keyed_generator(p.participant_id))
            },
        ),
    ),
    "a table": lambda p: replace(FIT, data=TensorRows(p.data("train", None))),
    "kept optimizers": lambda p: replace(FIT, optimizer=OPTIMIZERS["adam"], keep="local"),
    "draws": lambda p: replace(FIT, data=SampledBatches(drawn, 6), steps=4),
    "proxy replay": lambda p: replace(
        FIT, objective=ProxyReplay(), extra_batches={"public": SampledBatches(teacher_columns, 5)}
    ),
    "mutual": lambda p: replace(
        FIT, objective=Mutual(), train={"model": None, "other": ("head.",)}
    ),
    "frozen": lambda p: replace(FIT, objective=Mutual(), frozen=("other",)),
}


# Cases whose fits are computed one after the other.
ALONE = {"annealed", "draws", "kept optimizers"}


def drawn(g: torch.Generator, size: int) -> Columns:
    return {
        "x": torch.rand(size, 1, 8, 8, generator=g),
        "y": torch.randint(4, (size,), generator=g),
    }


def teacher_columns(g: torch.Generator, size: int) -> Columns:
    return {
        "x": PUBLIC["x"][torch.randint(24, (size,), generator=g)],
        "teacher": torch.rand(size, 4, generator=g),
    }


@dataclass(frozen=True)
class Mutual(Objective):
    """Two models of a client learn from each other; the second head reads the first features."""

    def loss(self, nets: ModelViews, batch: Batch, context: Any) -> Tensor:
        features, other = nets.model.forward_features(batch.x), nets.other(batch.x)
        one = nets.model.forward_head(features)
        gap = distillation_loss(
            "multiclass", one, nets.other.forward_head(features)
        ) + other.square().mean(-1)
        return torch.nn.functional.cross_entropy(one, batch.y, reduction="none") + gap


@each_case("large", [2**14, 0])
def test_large_linear_layers_use_a_separate_rule(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectorized_training, "MIN_LINEAR_WEIGHTS", large)
    both(arch("mlp", hidden=(260, 12)), lambda p: FIT)
    both(
        arch("transformer", width=8, depth=1),
        lambda p: replace(FIT, frozen=("other",), objective=Mutual()),
    )


@each_case(("model", "case"), itertools.product(["batch norm", "dropout"], CASES))
def test_every_fit_option_matches_serial_training(case: str, model: str, stacks: list[int]) -> None:
    stacks.clear()
    of = arch(width=4) if model == "batch norm" else arch("mlp", hidden=(12,), dropout=0.4)
    both(of, CASES[case])
    # An objective that is defined outside of the package is tried with two participants.
    trial = [2] if case in ("frozen", "mutual") else []
    assert stacks == trial + ([] if case in ALONE else [5])


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return the number of participants in each computation."""
    sizes: list[int] = []

    def counting(real: Any) -> Any:
        return lambda work, templates: (sizes.append(len(work)), real(work, templates))[1]

    for name in ("fit_stacked", "run_stacked_outputs"):
        monkeypatch.setattr(vectorized, name, counting(getattr(vectorized, name)))
    yield sizes


def test_different_fits_are_not_stacked(stacks: list[int]) -> None:
    other = replace(FIT, optimizer=OPTIMIZERS["adam"])
    work = [(p, other if i == 1 else FIT) for i, p in enumerate(clients(arch(width=4)))]
    VectorizedBackend(DeviceMemory(CPU), pytest.fail).run(work)
    assert stacks == [4]


def test_large_groups_are_split(stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectorized, "MAX_STACK_BYTES", 1)
    both(arch(width=4), lambda p: FIT, sizes=(40, 33, 17, 40))
    assert stacks == [2, 2]


def test_fits_of_one_participant_draw_in_order() -> None:
    def double_fit(backend: Any) -> list[Participant]:
        result = clients(arch(width=4))
        backend.run(
            [
                (p, replace(FIT, train={s: None}, objective=Supervised(slot=s)))
                for p in result
                for s in (
                    ("model", "other") if p.participant_id != "site_1" else ("other", "model")
                )
            ]
        )
        return result

    agree(
        [p.models for p in double_fit(VectorizedBackend(DeviceMemory(CPU), pytest.fail))],
        [p.models for p in double_fit(SerialBackend(DeviceMemory(CPU)))],
    )


def test_diverging_participant_does_not_affect_others() -> None:
    def make(p: Participant) -> Fit:
        bad = p.participant_id == "site_3"
        return replace(FIT, context={"log_prior": torch.full((4,), float("nan") if bad else 0.0)})

    one, many = clients(arch(width=4)), clients(arch(width=4))
    expected = SerialBackend(DeviceMemory(CPU)).run([(p, make(p)) for p in one])
    found = VectorizedBackend(DeviceMemory(CPU), pytest.fail).run([(p, make(p)) for p in many])
    assert isinstance(found[3], DivergedError) and str(found[3]) == str(expected[3])
    assert all(isinstance(r, FitReport) for i, r in enumerate(found) if i != 3)
    agree([(p.models, p.state) for p in many], [(p.models, p.state) for p in one])


@each_case(("name", "reason"), [("gru", "gru"), ("mlp", "item")])
def test_unsupported_models_run_serially_with_one_note(
    name: str, reason: str, stacks: list[int]
) -> None:
    stacks.clear()
    of, notes = arch(name), []
    fit = FIT if name == "gru" else replace(FIT, objective=Peeking())
    one, many = clients(of), clients(of)
    for p in (*one, *many):
        # Used before: a failed attempt must neither count as use nor clear the state.
        p.stream("train")
    serial, batched = (
        SerialBackend(DeviceMemory(CPU)),
        VectorizedBackend(DeviceMemory(CPU), notes.append),
    )
    for _ in range(2):
        expected = serial.run([(p, fit) for p in one])
        assert batched.run([(p, fit) for p in many]) == expected
    agree([(p.models, p.stream_uses) for p in many], [(p.models, p.stream_uses) for p in one])
    assert (
        len(notes) == 1
        and notes[0].startswith(f"{name}: cannot be vectorized over clients")
        and reason in notes[0]
    )
    # Tried once, with two participants if the objective is defined outside of the package.
    assert stacks == ([5] if name == "gru" else [2])


@dataclass(frozen=True)
class Peeking(Objective):
    """An objective with control flow that depends on values."""

    def loss(self, nets: ModelViews, batch: Batch, context: Any) -> Tensor:
        logits = nets.model(batch.x)
        return logits.square().sum(-1) if logits.sum().item() > 0 else logits.abs().sum(-1)


OUTPUTS: dict[str, Make] = {
    "logits": lambda p: Predict("model", batch_size=8),
    "features on public rows": lambda p: Predict(
        "model", Rows("proxy"), readout="features", batch_size=10
    ),
    "sent models": lambda p: Predict("", tensors=floats_of(p), arch=p.arch["other"]),
    "class sums": lambda p: ClassSums("model", batch_size=16),
    "class sums of log p": lambda p: ClassSums("model", readout="log_probabilities", at_least=-1.4),
}


def floats_of(p: Participant) -> dict[str, Tensor]:
    return {n: t * 1.5 for n, t in p.models["other"].items() if t.is_floating_point()}


@each_case("case", OUTPUTS)
def test_outputs_match_serial_prediction(case: str, stacks: list[int]) -> None:
    stacks.clear()
    both(arch(width=4), OUTPUTS[case], sizes=(*SIZES, 0) if case == "logits" else SIZES)
    # On proxy rows separately, where equal models are evaluated once.
    assert stacks == ([] if "public" in case else [5])


@each_case(
    ("n", "change"),
    itertools.product(
        [1, 7, 8, 9, 16, 17, 40], [{}, {"epochs": 3}, {"steps": 5}, {"batch_size": 1}]
    ),
)
def test_number_of_steps_matches_training(n: int, change: dict[str, Any]) -> None:
    fit = replace(FIT, **change)
    assert step_count(n, fit) == len(index_batches(n, fit, ("k",)))
