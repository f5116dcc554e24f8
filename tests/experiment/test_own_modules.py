"""Modules of users: results as a loop of plain torch gives them.

The modules have tied weights, buffers that are assigned or changed in place, frozen parameters and
other habits of users' code. Each client trains on all of its rows at once, so that the loop does
not depend on the order of rows.
"""

from __future__ import annotations

import copy
import gc
import random
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune
from typing_extensions import override

import hetero_fl as hfl
from hetero_fl.core.forward_writes import observe_forward
from hetero_fl.core.given_models import GivenModel
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import floating_tensors
from hetero_fl.core.plan import Predict, TensorRows
from hetero_fl.core.saved_model import SavedModel
from hetero_fl.core.task import Task
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.experiment import PreparedRun
from hetero_fl.federation.store import PrivateState
from hetero_fl.utils.errors import RunFailedError, UserError
from model_zoo.module_state import ModuleSnapshot, load_state
from model_zoo.shapes import make_shape
from tests.support.cases import each_case
from tests.support.federations import same_bits
from tests.support.python_federations import QUIET, images

ROUNDS = 2
EPOCHS = 2
LEARNING_RATE = 0.1
WIDTH = 4
HABITS = [
    *("tied", "tied_head", "shared_layer", "frozen", "frozen_by_train"),
    *("assigned", "in_place", "counter", "attribute", "attribute_in_place"),
    *("not_persistent", "cache", "batch_norm", "spectral_norm"),
    *("recurrent", "for_evaluation", "written_rarely", "written_parameter"),
    *("handed_on", "swapped", "remembers_mode", "sets_mode", "number", "cached_mean"),
]
# Habits with which a tensor is an attribute, or a buffer that is not saved.
ATTRIBUTES = {"center": "attribute", "peak": "attribute_in_place"}
NOT_PERSISTENT = {"center": "not_persistent", "low": "written_rarely"}


class Habits(nn.Module):
    """A classifier of table rows with some of the habits above."""

    def __init__(self, habits: frozenset[str]) -> None:
        super().__init__()
        self.habits = habits
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        if "tied" in habits:
            self.second.weight = self.first.weight
        if "tied_head" in habits:
            self.out.weight = self.first.weight
        if "shared_layer" in habits:
            self.second = self.first
        spectral_norm = nn.utils.parametrizations.spectral_norm
        third = spectral_norm(nn.Linear(WIDTH, WIDTH)) if "spectral_norm" in habits else None
        self.third = third or nn.Identity()
        if "frozen" in habits:
            self.first.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(WIDTH) if "batch_norm" in habits else nn.Identity()
        for name in ("center", "peak", "low", "old", "new"):
            if ATTRIBUTES.get(name) in habits:
                setattr(self, name, torch.zeros(WIDTH))
            else:
                is_persistent = NOT_PERSISTENT.get(name) not in habits
                self.register_buffer(name, torch.zeros(WIDTH), is_persistent)
        self.register_buffer("steps", torch.tensor(0))
        self.mean = torch.zeros(WIDTH)
        self.average = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
        if "recurrent" in habits:
            self.memory = nn.LSTM(1, WIDTH, batch_first=True)
        self.last: Tensor | None = None
        self.last_mean = torch.zeros(WIDTH)
        self.scale = 1.0
        self.factor = nn.Parameter(torch.ones(()), requires_grad="number" in habits)
        self.switch = nn.Identity()

    def train(self, mode: bool = True) -> Habits:
        super().train(mode)
        if "remembers_mode" in self.habits:
            self.scale = 1.0 if mode else 0.5
        if "frozen_by_train" in self.habits:
            self.second.bias.requires_grad_(False)
        return self

    def write(self, x: Tensor) -> None:
        """Write state from rows."""
        if self.habits & {"assigned", "attribute", "not_persistent"}:
            self.center = 0.5 * self.center + 0.5 * x.mean(0)
        if self.habits & {"in_place", "attribute_in_place"}:
            self.peak.copy_(torch.maximum(self.peak, x.amax(0)))
        if "counter" in self.habits:
            self.steps += 1
        if "written_rarely" in self.habits:
            # It changes for negative values only.
            self.low = torch.minimum(self.low, x.amin(0))
        if "written_parameter" in self.habits:
            self.average.data.mul_(0.5).add_(0.5 * x.mean(0))
        if "for_evaluation" in self.habits:
            self.mean = x.mean(0)
        if "handed_on" in self.habits:
            self.old = self.new
            self.new = x.mean(0)
        if "swapped" in self.habits:
            self.old, self.new = self.new, self.old
            self.new.copy_(0.5 * self.old + 0.5 * x.mean(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.write(x.detach())
        else:
            x = x - self.mean
        x = (x - self.center) / (1 + self.peak) * (1 + self.steps / 10) + self.low - self.average
        x = x - self.old + 0.5 * self.new
        if "recurrent" in self.habits:
            x = x + self.memory(x[:, :, None])[0][:, -1]
        x = self.first(x).tanh()
        if "used_twice" in self.habits:
            x = F.linear(x, self.first.weight, self.second.bias)
        else:
            x = self.second(x)
        x = self.norm(self.third(x))
        if "sets_mode" in self.habits and self.switch.training:
            x = 0.5 * x
            self.switch.eval()
        if "cache" in self.habits:
            self.last = x
        if "cached_mean" in self.habits:
            self.last_mean = x.mean(0)
        return self.out(self.scale * self.factor * x.tanh())  # type: ignore[no-any-return]


class Layers(nn.Module):
    """Two layers, in which subclasses differ."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).tanh())  # type: ignore[no-any-return]


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % WIDTH
    return rng.normal(size=(count, WIDTH)) + np.eye(WIDTH)[y], y


class LargeModel(Habits):
    """A module that a configuration can name."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(frozenset(["counter"]))


DATA = {f"site_{i}": rows(20 + 4 * i, i) for i in range(3)}
TEST = rows(16, 9)


def local_names(habits: frozenset[str]) -> set[str]:
    """Names of the state that stays at a client in FedAvg."""
    kept = [*ATTRIBUTES.items(), *NOT_PERSISTENT.items()]
    names = {name for name, habit in kept if habit in habits}
    return names | {"steps", "mean", "last", "norm.num_batches_tracked"}


class Reference:
    """Clients in plain torch: each has a module of its own, and FedAvg averages `state_dict`."""

    def __init__(self, module: nn.Module, epochs: int = EPOCHS) -> None:
        self.modules = {client: copy.deepcopy(module) for client in DATA}
        self.epochs = epochs

    def run(self, local: Collection[str] | None) -> Reference:
        """Train all rounds, with averages of all tensors but the local ones, or without (None)."""
        for _ in range(ROUNDS):
            for client, module in self.modules.items():
                self.train(module, *map(torch.from_numpy, DATA[client]))
            if local is not None:
                self.average(local)
        return self

    def train(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE)
        for _ in range(self.epochs):
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

    @torch.no_grad()
    def average(self, local: Collection[str]) -> None:
        total = sum(len(DATA[client][1]) for client in self.modules)
        states = {client: module.state_dict() for client, module in self.modules.items()}
        mean = {
            name: sum(len(DATA[c][1]) / total * state[name] for c, state in states.items())
            for name in next(iter(states.values()))
            if name not in local
        }
        for state in states.values():
            for name, tensor in mean.items():
                state[name].copy_(tensor)

    def state(self, client: str) -> dict[str, Tensor]:
        module = self.modules[client]
        attributes = {n: v for n, v in vars(module).items() if isinstance(v, Tensor)}
        return {**dict(module.named_parameters()), **dict(module.named_buffers()), **attributes}

    @torch.no_grad()
    def loss(self, client: str) -> float:
        x, y = map(torch.from_numpy, TEST)
        return float(F.cross_entropy(self.modules[client].eval()(x), y))


def train(
    module: nn.Module | Mapping[str, nn.Module],
    method: hfl.Algorithm,
    executor: str,
    clients: Sequence[str] = tuple(DATA),
    epochs: int = EPOCHS,
    **sections: Any,
) -> hfl.Run:
    splits = {"validation": rows(8, 7), "test": rows(8, 8)}
    init = "seeded" if "privacy" in sections else "given"
    modules = module if isinstance(module, Mapping) else dict.fromkeys(clients, module)
    federation = hfl.Federation(
        [
            hfl.Client(client, modules[client], DATA[client], head="out", init=init, **splits)
            for client in clients
        ],
        test=TEST,
        defaults=hfl.ClientSettings(
            epochs=epochs, batch_size=100, optimizer=hfl.SGD(lr=LEARNING_RATE)
        ),
    )
    workers = ["runtime.workers=2"] if executor in ("processes", "ray") else []
    overrides = [*QUIET, f"runtime.executor={executor}", *workers]
    return federation.train(method, rounds=ROUNDS, overrides=overrides, **sections)


def own_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Key the tensors of a split model by their names in the user's module."""
    return {
        name.replace("head.", "out.").removeprefix("backbone."): tensor
        for name, tensor in tensors.items()
    }


def check_equals_reference(run: hfl.Run, reference: Reference) -> None:
    losses = {client["id"]: client["global"]["loss"] for client in run.summary["clients"]}
    for client in reference.modules:
        expected = reference.state(client)
        for name, tensor in own_names(run.models[client].tensors).items():
            if name != "norm.num_batches_tracked":  # nothing depends on it
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)
        assert losses[client] == pytest.approx(reference.loss(client), abs=1e-6)


# Together, these have all habits.
COMBINATIONS = {
    "tied": ["tied", "assigned", "frozen", "counter"],
    "tied_head": ["tied_head", "attribute", "in_place", "cache"],
    "shared_layer": ["shared_layer", "not_persistent", "frozen_by_train", "batch_norm"],
    "in_place": ["attribute_in_place", "spectral_norm", "for_evaluation"],
    "recurrent": ["recurrent", "written_rarely", "written_parameter"],
    "handed_on": ["handed_on", "remembers_mode"],
    "number": ["number", "in_place", "cached_mean"],
    "swapped": ["swapped", "assigned", "sets_mode"],
}


def draw_habits(seed: int) -> list[str]:
    rng = random.Random(seed)
    return rng.sample(HABITS, rng.randint(2, 6))


# Executor and number of steps of a fit, by name. Executors with processes start slowly, so they
# train some of the combinations.
CASES = {name: [("serial", EPOCHS), ("batched", EPOCHS), ("serial", 1)] for name in COMBINATIONS}
CASES["tied"].append(("processes", EPOCHS))
CASES["recurrent"].append(("processes", EPOCHS))
DRAWN = {f"drawn_{n}": [("serial", 1 + n % 3), ("batched", 1 + n % 3)] for n in range(8)}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in DRAWN)]
)
def test_own_module_gives_the_result_of_plain_torch(
    name: str, subtests: pytest.Subtests, float64: None
) -> None:
    habits = frozenset(COMBINATIONS.get(name) or draw_habits(int(name.removeprefix("drawn_"))))
    for executor, steps in {**CASES, **DRAWN}[name]:
        # Modules with parametrizations cannot be pickled.
        chosen = habits - {"spectral_norm"} if executor == "processes" else habits
        module = Habits(chosen)
        for method, local in ((hfl.Local(), None), (hfl.FedAvg(), local_names(chosen))):
            with subtests.test(executor=executor, steps=steps, method=type(method).__name__):
                reference = Reference(module, steps).run(local)

                run = train(module, method, executor, epochs=steps)

                check_equals_reference(run, reference)


@each_case("habit", ["recurrent", "cache", "cached_mean"])
def test_copies_of_a_module_are_averaged_as_in_plain_torch(habit: str, float64: None) -> None:
    module = Habits(frozenset([habit]))
    copies = {client: copy.deepcopy(module) for client in DATA}
    with torch.no_grad():
        copies["site_1"].eval()(torch.ones(2, WIDTH))
    reference = Reference(module).run(local_names(module.habits))

    run = train(copies, hfl.FedAvg(), "serial")

    check_equals_reference(run, reference)
    again = {client: copy.deepcopy(module) for client in DATA}
    assert hfl.Run.load(run.path, models=again).models["site_1"].arch == run.models["site_0"].arch


def test_modules_with_other_values_of_a_read_attribute_are_not_averaged() -> None:
    copies = {client: Habits(frozenset(["cache"])) for client in DATA}
    copies["site_1"].scale = 2.0

    run = train(copies, hfl.FedAvg(), "serial")

    archs = {client: model.arch for client, model in run.models.items()}
    assert archs["site_0"] == archs["site_2"] != archs["site_1"]
    log = (run.path / "log.txt").read_text()
    assert "of 'site_0' and 'site_1': they have the same class and tensors, but differ in" in log
    assert "differ in 'scale'; " in log


class Scaled(nn.Module):
    """A linear model with a factor."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, width)
        self.out = nn.Linear(width, 3)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.scale * self.hidden(x.flatten(1)))  # type: ignore[no-any-return]


def test_only_modules_of_equal_class_and_tensors_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    differences = GivenModel.differences
    monkeypatch.setattr(
        GivenModel, "differences", lambda *pair: compared.append(pair) or differences(*pair)
    )
    modules = [*(Scaled(width, 1.0) for width in range(1, 6)), Scaled(5, 2.0), Scaled(5, 2.0)]
    clients = [hfl.Client(f"c{i}", module, images(30, i)) for i, module in enumerate(modules)]

    notes = hfl.Federation(clients).prepare("fedavg").notes

    assert any("the modules of 'c4' and 'c5': " in note for note in notes)
    assert len(compared) == 1


class Total:
    """A callable object with a value."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self) -> float:
        return self.value


class Counter(Layers):
    """A classifier that keeps state where no federation finds it."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.change = change
        self.calls = 0
        self.center: Tensor | None = None
        self.seen: list[float] = []
        self.noise = np.random.default_rng(0)
        self.recent: deque[float] = deque(maxlen=9)
        self.table = np.zeros(1)
        self.total = Total()
        self.bias = 0.0
        self.register_buffer("queue", torch.zeros(0, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.change(self)
        center = x.mean(0) if self.center is None else self.center
        scale = 1 + self.calls + len(self.seen) + len(self.queue) + len(self.recent)
        scale = scale + self.table.item() + self.total() + (0 if self.training else self.bias)
        return self.out(self.body(x - center).tanh() * scale)  # type: ignore[no-any-return]


# What a forward pass changes, by the name of the changed attribute.
CHANGES: dict[str, Callable[[Any], object]] = {
    "calls": lambda module: setattr(module, "calls", module.calls + 1),
    "center": lambda module: setattr(
        module,
        "center",
        torch.ones(WIDTH) if module.center is None else 0.9 * module.center,
    ),
    "noise": lambda module: module.noise.random(),
    "seen": lambda module: module.seen.append(0.5),
    "recent": lambda module: module.recent.append(0.5),
    "table": lambda module: np.add(module.table, 1, out=module.table),
    "total": lambda module: setattr(module.total, "value", module.total.value + 1),
    "bias": lambda module: setattr(module, "bias", 0.5),
    "queue": lambda module: setattr(
        module, "queue", torch.cat([module.queue, torch.zeros(1, WIDTH)])
    ),
    "body.weight": lambda module: module.body.requires_grad_(False),
    "body": lambda module: setattr(module, "body", nn.Linear(WIDTH, WIDTH)),
    "body.bias": lambda module: setattr(module.body, "bias", nn.Parameter(0.5 * module.body.bias)),
}


@each_case(("name", "change"), CHANGES.items())
def test_state_that_cannot_be_carried_is_refused_in_one_line(
    name: str, change: Callable[[Any], object]
) -> None:
    for executor in ("serial", "batched"):
        with pytest.raises(UserError, match=rf"'backbone\.{name}'") as caught:
            train(Counter(change), hfl.FedAvg(), executor)

        assert "\n" not in str(caught.value)


def one_client(model: Any) -> hfl.Federation:
    return hfl.Federation([hfl.Client("site_0", model, DATA["site_0"])], test=TEST)


def share_transposed(module: Any) -> None:
    module.second.weight = nn.Parameter(module.first.weight.t())


def share_buffers(module: Any) -> None:
    module.register_buffer("pair", torch.zeros(2, WIDTH))
    module.register_buffer("peak", module.pair[0])


def share_attribute(module: Any) -> None:
    module.pair = torch.zeros(2, WIDTH)
    module.register_buffer("peak", module.pair[0])


def add_spectrum(kind: torch.dtype, module: Any) -> None:
    module.spectrum = nn.Parameter(torch.ones(3, dtype=kind))


SHARED = [
    (share_transposed, r"'second\.weight' shares memory with the parameter 'first\.weight'"),
    (share_buffers, "'pair' shares memory with the buffer 'peak'"),
    (share_attribute, "'pair' shares memory with the buffer 'peak'"),
    (partial(add_spectrum, torch.complex64), r"'spectrum' has the unsupported type torch\."),
    (partial(add_spectrum, torch.bfloat16), r"'spectrum' has the unsupported type torch\."),
]


@each_case(("change", "message"), SHARED)
def test_tensors_that_cannot_be_sent_are_refused(
    change: Callable[[Any], None], message: str
) -> None:
    def make() -> nn.Module:
        module = Habits(frozenset())
        change(module)
        return module

    for model in (make, make()):
        with pytest.raises(UserError, match=message):
            one_client(model).prepare(hfl.FedAvg())


def test_snapshot_of_a_computed_attribute_stays_as_it_was() -> None:
    module = nn.Linear(WIDTH, WIDTH)
    module.scale = 2 * module.bias
    expected = module.scale.detach().clone()
    snapshot = ModuleSnapshot(module)

    for _ in range(2):
        module.scale.data.add_(1)
        snapshot.restore(snapshot.changes())

    assert torch.equal(module.scale, expected)


class SeveralTypes(Layers):
    """A classifier with a buffer and a layer of another type than its head."""

    def __init__(self) -> None:
        super().__init__()
        self.body.double()
        self.register_buffer("count", torch.full((1,), 1e8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
        return self.out(self.body(x.double()).tanh().float())  # type: ignore[no-any-return]


def test_module_with_several_types_of_numbers_keeps_them() -> None:
    for executor in ("serial", "batched"):
        run = train(SeveralTypes(), hfl.Local(), executor)

        tensors = own_names(run.models["site_0"].tensors)
        assert tensors["body.weight"].dtype == torch.float64
        assert tensors["count"].item() == 1e8 + ROUNDS * EPOCHS


class ExtraState(Habits):
    """A module whose `state_dict` has an entry that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 1}


def module_of_columns() -> nn.Module:
    """Return a module whose buffers are columns of one tensor, with a view of a weight."""
    module = Habits(frozenset())
    columns = torch.zeros(WIDTH, 2)
    module.register_buffer("center", columns[:, 0])
    module.register_buffer("peak", columns[:, 1])
    module.transposed = module.first.weight.data.t()
    return module


def test_state_that_is_not_averaged_or_not_shared_is_accepted() -> None:
    for module, method in (
        (ExtraState(frozenset()), hfl.FedAvg()),
        (Habits(frozenset(["batch_norm", "in_place"])), hfl.Ensemble()),
        (module_of_columns(), hfl.FedAvg()),
    ):
        run = train(module, method, "serial")

        assert run.summary["rounds_completed"] == ROUNDS


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_lazy_layers_and_compiled_modules_are_refused_in_one_line() -> None:
    def make_lazy() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(WIDTH), nn.LazyBatchNorm1d(), nn.Linear(WIDTH, WIDTH))

    traced = torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.zeros(2, WIDTH))  # type: ignore[no-untyped-call]
    compiled = nn.Sequential(traced, nn.Linear(WIDTH, WIDTH))
    for model, message in [(make_lazy, "lazy layers"), (compiled, "compiled to TorchScript")]:
        with pytest.raises(UserError, match=message):
            one_client(model).prepare(hfl.FedAvg())


def test_functions_of_one_source_text_start_with_their_own_weights() -> None:
    def first_weight(width: int, scale: float) -> Tensor:
        def make() -> nn.Module:
            module = nn.Sequential(nn.Linear(WIDTH, width), nn.Linear(width, WIDTH))
            nn.init.normal_(module[0].weight, std=scale)
            return module

        clients = [hfl.Client(name, make, data) for name, data in DATA.items()]
        federation = hfl.Federation(clients, test=TEST).prepare(hfl.FedAvg()).federation
        client = federation.client("site_0", PrivateState(), 0)
        return client.models["model"]["backbone.0.weight"]

    found = []
    for width, scale in [(8, 1.0), (8, 10.0), (16, 1.0)]:
        found.append(first_weight(width, scale))
        # The name of the function is free after the function is gone.
        gc.collect()

    torch.testing.assert_close(found[1], 10 * found[0])
    assert found[2].shape == (16, WIDTH)


@each_case("method", [hfl.FedAvg(server_lr=0.5), hfl.FedAvgM(), hfl.FedAdam(), hfl.FedYogi()])
def test_tied_weights_are_moved_by_the_server_as_one_tensor(
    method: hfl.Algorithm, float64: None
) -> None:
    modules = []
    for habit in ("tied", "used_twice"):
        torch.manual_seed(0)
        modules.append(Habits(frozenset([habit])))
    tied, shared = (train(module, method, "serial") for module in modules)

    for client in DATA:
        one, other = tied.models[client].tensors, shared.models[client].tensors
        assert same_bits(one, {name: other[name] for name in one})


@pytest.mark.parametrize(
    "sections", [{}, {"privacy": hfl.Privacy(noise_multiplier=1.0, delta=1e-4)}]
)
def test_tied_weights_are_saved_as_one_tensor(sections: dict[str, Any], tmp_path: Path) -> None:
    module = Habits(frozenset(["tied", "tied_head"]))

    run = train(module, hfl.FedAvg(), "batched", **sections)
    run.save(tmp_path / "run")
    exported = hfl.export(run, "site_0", "safetensors", out=tmp_path, allow_code=True)["site_0"]

    loaded = hfl.Run.load(tmp_path / "run", allow_code=True).models["site_0"]
    module = loaded.module()
    assert module.head.weight is module.backbone.first.weight is module.backbone.second.weight
    assert not {"second.weight", "out.weight"} & own_names(loaded.tensors).keys()
    assert same_bits(load_file(exported.model), loaded.tensors)


class Stored(Habits):
    """A module that a configuration can name."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(frozenset(["tied", "tied_head", "not_persistent", "attribute_in_place"]))


def saved_by_an_older_version() -> SavedModel:
    """Return a model with tied weights under all names and without the client's other state."""
    arch = ModelSpec.from_config(f"python:{__name__}:Stored", WIDTH, (WIDTH,))
    tensors = {n: t.clone() for n, t in arch.build(seed=1).state_dict().items()}
    kept = {n: t for n, t in tensors.items() if n not in arch.local_names}
    return SavedModel(kept, arch, {}, Task("multiclass", WIDTH))


def test_model_of_an_older_version_predicts_as_plain_torch() -> None:
    saved = saved_by_an_older_version()
    module = Stored(WIDTH, WIDTH)
    module.load_state_dict(own_names(saved.tensors), strict=False)
    rows = torch.from_numpy(TEST[0]).float()

    assert {"backbone.second.weight", "head.weight"} <= saved.tensors.keys()
    torch.testing.assert_close(saved.module()(rows), module.eval()(rows))

    del saved.tensors["backbone.first.bias"]
    with pytest.raises(
        UserError, match=r"Stored: does not fit .*'backbone\.first\.bias' is missing"
    ):
        saved.module()
    extra = saved_by_an_older_version()
    extra.tensors["x"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"Stored: does not fit .*'x' is not a tensor"):
        extra.module()


@each_case("method", [hfl.FedPer(), hfl.FedRep()])
def test_layer_that_backbone_and_head_share_is_averaged(method: hfl.Algorithm) -> None:
    run = train(Habits(frozenset(["tied_head"])), method, "serial")

    weights = [run.models[client].module().head.weight for client in DATA]

    assert all(torch.equal(weight, weights[0]) for weight in weights)


SENDING = [
    *(hfl.Ensemble(), hfl.Dense(), hfl.Centralized()),
    hfl.Centralized(each_architecture=True),
    hfl.FedGKT(large_model={"name": f"python:{__name__}:LargeModel"}, feature_dim=WIDTH),
]


@each_case("method", SENDING)
def test_models_with_integers_that_training_changes_are_not_sent(method: hfl.Algorithm) -> None:
    with pytest.raises(UserError, match=r"no integers, such as 'backbone\.steps'"):
        train(Habits(frozenset(["counter"])), method, "serial")


WRITTEN = [
    *("assigned", "in_place", "attribute", "attribute_in_place", "not_persistent"),
    *("for_evaluation", "written_parameter"),
]


@each_case("habit", WRITTEN)
def test_private_records_refuse_state_that_is_written_from_rows(habit: str) -> None:
    privacy = hfl.Privacy(noise_multiplier=5.0, delta=1e-4)

    with pytest.raises(UserError, match=r"writes 'backbone\.\w+' from rows") as caught:
        train(Habits(frozenset([habit])), hfl.FedAvg(), "serial", privacy=privacy)

    assert "privacy.unit=record" in str(caught.value) and "\n" not in str(caught.value)


class RecordingFedAvg(hfl.FedAvg):
    """FedAvg that records the names of the tensors that the server receives."""

    title = "Recording FedAvg"
    received: ClassVar[set[str]] = set()

    @override
    def aggregate(self, server: Any, uploads: Any) -> Any:
        for mean in uploads.mean_by_group("model").values():
            self.received.update(mean)
        yield from super().aggregate(server, uploads)


@each_case(
    ("unit", "habits"),
    [("client", ["in_place"]), ("local", ["in_place", "frozen", "batch_norm"])],
)
def test_private_clients_share_trained_parameters_only(unit: str, habits: list[str]) -> None:
    module = Habits(frozenset(habits))
    privacy = hfl.Privacy(unit=unit, noise_multiplier=1.0, delta=1e-4, clip=1.0)
    RecordingFedAvg.received.clear()

    run = train(module, RecordingFedAvg(), "serial", privacy=privacy)

    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert own_names(dict.fromkeys(RecordingFedAvg.received)).keys() == trained
    tensors = {client: own_names(run.models[client].tensors) for client in DATA}
    if "frozen" in habits:
        assert all(torch.equal(own["first.bias"], module.first.bias) for own in tensors.values())
    for client, (x, _) in DATA.items():
        expected = torch.from_numpy(x).amax(0).clamp(min=0).float()
        torch.testing.assert_close(tensors[client]["peak"], expected)


@each_case(
    ("method", "item"),
    [
        (hfl.Ensemble(), "member"),
        (hfl.Dense(synthesis_epochs=1, generator_steps=1, student_steps=1), "model"),
    ],
)
def test_whole_models_of_private_clients_are_sent_with_noise(
    method: hfl.Algorithm, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Habits(frozenset(["in_place"]))
    # Nothing is clipped, so only noise changes the tensors.
    privacy = hfl.Privacy(unit="local", noise_multiplier=1.0, delta=1e-4, clip=100.0)
    sent: list[dict[str, Tensor]] = []
    aggregate = type(method).aggregate

    def record(self: Any, server: Any, uploads: Any) -> Any:
        sent.extend(own_names(u.payload[item]) for u in uploads.containing(item))
        return aggregate(self, server, uploads)

    monkeypatch.setattr(type(method), "aggregate", record)
    train(module, method, "serial", privacy=privacy)

    floating = {n for n, t in module.state_dict().items() if t.is_floating_point()}
    # The first uploads are those of a dry run.
    for each, (x, _) in zip(sent[-len(DATA) :], DATA.values(), strict=True):
        true = torch.from_numpy(x).amax(0).clamp(min=0).float()
        assert floating <= each.keys()
        assert not torch.isclose(each["peak"], true, atol=1e-3).any()


def test_attribute_that_no_pass_reads_is_not_kept() -> None:
    module = Habits(frozenset(["cache", "cached_mean"]))

    for unit in ("record", "client"):
        privacy = hfl.Privacy(unit=unit, noise_multiplier=1.0, delta=1e-4, clip=1.0)
        run = train(module, hfl.FedAvg(), "batched", privacy=privacy)

        assert not {"last", "last_mean"} & own_names(run.models["site_0"].tensors).keys()
        assert "cannot be vectorized" not in (run.path / "log.txt").read_text()


class ReadsRarely(Habits):
    """A module whose outputs depend on an attribute for large values only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - torch.where(x > 99, self.last_mean.detach(), 0.0))


def test_attribute_that_a_pass_reads_for_some_values_is_kept() -> None:
    run = train(ReadsRarely(frozenset(["cached_mean"])), hfl.Local(), "serial")

    means = [own_names(run.models[client].tensors)["last_mean"] for client in DATA]
    assert not torch.equal(*means[:2])


class ReadsLate(Habits):
    """A module that reads what the previous pass wrote, but not in its first passes."""

    def __init__(self, habits: frozenset[str]) -> None:
        super().__init__(habits)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        late = self.last_mean.detach() if self.passes > 3 else torch.zeros(())
        return super().forward(x - late)


def test_attribute_that_only_later_passes_read_is_an_error() -> None:
    with pytest.raises(RunFailedError, match=r"no attribute 'last_mean'; .*buffer\('last_mean'"):
        train(ReadsLate(frozenset(["cached_mean"])), hfl.Local(), "serial")


class ReadsEither(Layers):
    """A module that reads one of two attributes, the second if the first is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x) + getattr(self, "first", getattr(self, "second", 0.0))
        self.first = outputs.detach().mean(0)
        self.second = self.first.clone()
        return outputs


def test_attributes_that_replace_each_other_are_kept() -> None:
    writes = observe_forward(ReadsEither(), make_shape(WIDTH, ()))

    assert writes.attributes == {"first", "second"}


class WritesSingleRows(Habits):
    """A module that writes state only if a batch has one row, as in DP-SGD."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            self.peak.copy_(torch.maximum(self.peak, x.detach().amax(0)))
        return super().forward(x)


def test_private_records_refuse_state_that_training_writes_unexpectedly() -> None:
    privacy = hfl.Privacy(noise_multiplier=5.0, delta=1e-4)
    module = WritesSingleRows(frozenset())

    with pytest.raises(UserError, match=r"writes 'backbone\.peak' from private rows"):
        train(module, hfl.FedAvg(), "serial", privacy=privacy)


class Hooked(nn.Module):
    """A module with a hook that changes the gradients of its first layer."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out.weight)
        if hook == "module":
            self.second.register_full_backward_hook(lambda _layer, grads, _out: (0.5 * grads[0],))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if self.hook == "tensor" and hidden.requires_grad:
            hidden.register_hook(lambda gradient: -gradient)
        return self.out(self.second(hidden))  # type: ignore[no-any-return]


EXACT = {"privacy": hfl.Privacy(noise_multiplier=1e-9, clip=1e3, delta=1e-4)}


@each_case(
    ("hook", "sections"), [("tensor", {}), ("tensor", EXACT), ("module", {}), ("module", EXACT)]
)
def test_hooks_change_gradients_as_in_plain_torch(
    hook: str, sections: dict[str, Any], float64: None
) -> None:
    torch.manual_seed(0)
    module = Hooked(hook)

    run = train(module, hfl.Local(), "batched", **sections)

    if sections:
        start = run.models["site_0"].arch.initial_tensors(seed=0)
        load_state(module, own_names(start))
    reference = Reference(module).run(local=None)
    check_equals_reference(run, reference)


class SparseEmbedding(Layers):
    """A module whose embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Embedding(20, WIDTH, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        codes = (x * 3 + 10).long().clamp(0, 19)
        return self.out(self.body(codes).mean(1))  # type: ignore[no-any-return]


def test_sparse_embedding_gives_the_result_of_plain_torch(float64: None) -> None:
    module = SparseEmbedding()
    reference = Reference(module).run(local=None)

    for executor in ("serial", "batched"):
        check_equals_reference(train(module, hfl.Local(), executor), reference)


class Constants(Layers):
    """A class with constants and other state.

    It draws the integers `order`, which are not sent. Training changes a buffer and an integer, and
    assigns `shift` for batches of fewer than four rows.
    """

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(WIDTH))
        self.register_buffer("mask", torch.ones(WIDTH), persistent=False)
        self.register_buffer("peak", torch.zeros(WIDTH), persistent=False)
        self.register_buffer("shift", torch.ones(WIDTH))
        self.register_buffer("steps", torch.tensor(0))
        self.body.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.peak = torch.maximum(self.peak, x.detach().amax(0))
            self.steps += 1
            if len(x) < 4:
                self.shift = 0.5 * self.shift
        x = (x - self.peak - self.shift) * self.mask
        return super().forward(x[:, self.order])


@each_case("chunk", [1, 8])
def test_received_model_has_the_integers_of_the_initial_model(chunk: int) -> None:
    clients = [hfl.Client(name, Constants, data) for name, data in DATA.items()]
    prepared = hfl.Federation(clients, test=TEST).prepare(hfl.FedAvg(), overrides=["seed=3"])
    client = prepared.federation.client("site_0", PrivateState(), 0)
    arch = client.arch["model"]
    received = floating_tensors(client.models["model"])
    rows = torch.from_numpy(TEST[0]).float()
    step = Predict("model", TensorRows({"x": rows}), tensors=received, arch=arch)
    module = arch.build()
    load_state(module, client.models["model"])

    found = make_backend(DeviceMemory(torch.device("cpu")), chunk).run([(client, step)] * 2)

    for outputs in found:
        torch.testing.assert_close(outputs, module.eval()(rows))


def test_assigned_buffers_of_some_batches_are_those_of_one_client_at_a_time() -> None:
    splits = {"validation": rows(8, 7), "test": rows(8, 8)}
    clients = [hfl.Client(name, Constants, rows(22, 1), **splits) for name in DATA]
    defaults = hfl.ClientSettings(batch_size=4, epochs=1)

    runs = [
        hfl.Federation(clients, test=TEST, defaults=defaults).train(
            hfl.Local(), rounds=1, overrides=[*QUIET, f"runtime.executor={executor}"]
        )
        for executor in ("serial", "batched")
    ]

    shifts = [own_names(run.models["site_0"].tensors)["shift"] for run in runs]
    assert torch.equal(shifts[0], torch.full([WIDTH], 0.5))
    assert torch.equal(shifts[0], shifts[1])


def test_constants_are_not_stored_for_each_client() -> None:
    clients = [hfl.Client(name, Constants, data) for name, data in DATA.items()]
    changed = {"peak", "steps"}
    trained = {"body.weight", "out.weight", "out.bias"}

    for method, expected in ((hfl.FedAvg(), changed), (hfl.Local(), changed | trained)):
        trainer = hfl.Federation(clients, test=TEST).prepare(method).make_trainer()
        trainer.run_round()

        for client in DATA:
            kept = trainer.store.get(client)
            stored = own_names(kept.models["model"])
            assert stored.keys() == expected
            models = own_names(trainer.federation.client(client, kept, 1).models["model"])
            assert torch.equal(models["peak"], stored["peak"])
            assert models["mask"].all() and models.keys() > stored.keys()


SEEN: list[tuple[tuple[int, ...], torch.dtype]] = []


class Recording(nn.Module):
    """A classifier that records the shape and type of the last inputs."""

    def __init__(self, num_classes: int, in_channels: int, input_size: tuple[int, ...]) -> None:
        super().__init__()
        self.out = nn.Linear(in_channels * int(np.prod(input_size)), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append((tuple(x.shape), x.dtype))
        return self.out(x.flatten(1).float())  # type: ignore[no-any-return]


def test_module_receives_channels_first(subtests: pytest.Subtests) -> None:
    for shape, expected in (((5, 6, 3), (3, 5, 6)), ((4,), (4,)), ((7, 2), (2, 7))):
        x = np.random.default_rng(0).random((60, *shape)).astype("float32")
        names = ("first", "second") if len(shape) == 2 else ()
        rows = hfl.from_arrays(x, np.arange(60) % 2, columns=names)
        with subtests.test(shape=shape):
            run = hfl.Federation([hfl.Client("site", Recording, rows)]).train(
                hfl.Local(), rounds=1, overrides=QUIET
            )
            run.predict("site", x[:9])

            assert SEEN[-1] == ((9, *expected), torch.float32)


def test_series_are_named_with_their_axes() -> None:
    def prepared(steps: int) -> PreparedRun:
        x = np.random.default_rng(0).random((60, steps, 3)).astype("float32")
        rows = hfl.from_arrays(x, np.arange(60) % 2, columns=("a", "b", "c"))
        # It takes series for [B, steps, columns].
        body = nn.Sequential(nn.Conv1d(steps, 4, 3), nn.Flatten())
        model = hfl.SplitModel(body, nn.Linear(4, 2))
        return hfl.Federation([hfl.Client("site", model, rows)]).prepare(hfl.Local())

    with pytest.raises(UserError, match=r"\(3 channels; batches have the shape \[B, 3, 7\]\)"):
        prepared(7)
    assert any("as many steps as columns" in note for note in prepared(3).notes)


def test_trained_module_has_the_state_dict_of_its_class(tmp_path: Path) -> None:
    own = Habits(frozenset({"not_persistent", "attribute_in_place"}))

    with hfl.Trainer(one_client(own), hfl.Local(), rounds=1, out=tmp_path, overrides=QUIET) as rest:
        next(iter(rest))
        modules = [rest.model("site_0")]
    modules.append(rest.run.model("site_0"))

    for module in modules:
        assert module.state_dict().keys() == own.state_dict().keys()
        assert dict(module.named_buffers()).keys() == dict(own.named_buffers()).keys()
        # The values are those of training.
        assert isinstance(module, Habits)
        assert module.center.any() and module.peak.any()


def train_one(model: Any) -> hfl.Run:
    return one_client(model).train(hfl.Local(), rounds=1, overrides=QUIET)


def test_module_of_one_type_is_converted_with_a_warning() -> None:
    for model in (Layers().double(), lambda: Layers().double()):
        run = train_one(model)

        assert run.models["site_0"].tensors["head.weight"].dtype is torch.float32
        log = (run.path / "log.txt").read_text()
        assert "converted from torch.float64 to torch.float32" in log


def two_types() -> nn.Module:
    """Return a module whose head has another type than its inputs."""
    module = Layers()
    module.out.double()
    return module


def pruned() -> nn.Module:
    module = Layers()
    prune.l1_unstructured(module.body, "weight", 0.5)
    return module


class ReadsFirst(Layers):
    """A module that reads an attribute which only training writes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = x.mean(0)
        return super().forward(x - self.mean)


MISUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: two_types, r"'out.weight' is torch.float64, but .*torch.float32"),
    (two_types, r"'out.weight' is torch.float64, but .*torch.float32"),
    (pruned, r"'body.weight' cannot be copied.*; pass a function"),
    (ReadsFirst, r"no attribute 'mean'; .*register_buffer\('mean', tensor"),
]


def test_modules_that_cannot_be_trained_are_refused(subtests: pytest.Subtests) -> None:
    for make, words in MISUSED:
        with subtests.test(words=words), pytest.raises(UserError, match=words):
            train_one(make())
    assert "backbone.body.weight_mask" in train_one(pruned).models["site_0"].tensors


def linked(links: Any, last: Any) -> GivenModel:
    """Return a module whose attribute contains a list twice, which contains a list twice, etc."""
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    for _ in range(40):
        links = [links, links]
    module.links = [links, last]  # type: ignore[assignment]
    return GivenModel(module)


def test_attributes_that_are_linked_repeatedly_are_described_once() -> None:
    first, second = [1], [2]

    given = linked([first, second], first)

    assert given.name == linked([[1], [2]], [1]).name
    assert given.name != linked([first, second], second).name
    assert given.name != linked([first, [3]], first).name
    assert given.differences(linked([first, second], second)) == ["links"]
