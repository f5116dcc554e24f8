"""One-line errors with a standard exception type for mistakes in data, models and settings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import hetero_fl as hfl
from hetero_fl.utils.errors import UserError
from tests.support.mistakes import check_raises_one_line
from tests.support.python_federations import QUIET, Net, images

X, Y = images(40, 1)
TABLE = np.zeros((40, 5), dtype=np.float32)
OTHER_SIZE = np.zeros((40, 9, 9), dtype=np.uint8)
COLORED = np.zeros((40, 3, 8, 8), dtype=np.uint8)


def prepared(
    data: Any = (X, Y), model: Any = "mlp", test: Any = (X, Y), client: Any = None, **settings: Any
) -> Any:
    own = hfl.Federation([hfl.Client("a", model, data, **(client or {}))], test=test, **settings)
    return own.prepare(hfl.Local())


def two(first: Any, second: Any) -> Any:
    clients = [hfl.Client("a", "mlp", first), hfl.Client("b", "mlp", second)]
    return hfl.Federation(clients, test=(X, Y)).prepare(hfl.Local())


class Stream(IterableDataset[Any]):
    """A data set that can only be iterated."""

    def __iter__(self) -> Iterator[Any]:
        yield X[0], Y[0]


class Unsized(Dataset[Any]):
    """A data set without a length."""

    def __getitem__(self, i: int) -> Any:
        return X[i], Y[i]


class Items(Unsized):
    """A data set whose items are given by a function."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        self.item = item

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


class TwoOutputs(nn.Module):
    """A model that returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(x.flatten(1)), x


class TwoInputs(TwoOutputs):
    """A model that needs two inputs."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.out(x.flatten(1) * mask)


class NeedsDepth(Net):
    """A model with an argument that no one passes."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)


def loss_with_a_lock() -> Callable[[Tensor, Tensor], Tensor]:
    lock = threading.Lock()

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        with lock:
            return nn.functional.cross_entropy(logits, y, reduction="none")

    return loss


def train_in_processes(**client: Any) -> Any:
    clients = [hfl.Client(name, "mlp", (X, Y), **client) for name in "ab"]
    overrides = [*QUIET, "runtime.executor=processes"]
    return hfl.Federation(clients, test=(X, Y)).train("local", rounds=1, overrides=overrides)


DATA: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "shapes of two clients": (
        UserError,
        r"'b': data: expected examples of shape \(1, 8, 8\).*got \(1, 9, 9\)",
        lambda: two((X, Y), (OTHER_SIZE, Y)),
    ),
    "table and images": (
        UserError,
        r"'b': data: expected examples of shape \(1, 8, 8\).*got \(5,\)",
        lambda: two((X, Y), (TABLE, Y)),
    ),
    "classes and numbers": (
        UserError,
        "'b': data: y: expected integers as in .*'a'.*, got fractions",
        lambda: two((X, Y), (X, Y + 0.25)),
    ),
    "channels of the test set": (
        UserError,
        r"expected examples of shape \(3, 8, 8\).*got \(1, 8, 8\)",
        lambda: prepared(test=(COLORED, Y)),
    ),
    "shape of the proxy set": (
        UserError,
        r"proxy.*expected examples of shape \(1, 8, 8\).*got \(1, 9, 9\)",
        lambda: prepared(proxy=OTHER_SIZE),
    ),
    "proxy set as a list of rows": (
        UserError,
        r"proxy: expected a pair \(x, y\), got a list of 40 values; pass rows as one array",
        lambda: prepared(proxy=X.tolist()),
    ),
    "test set without labels": (UserError, "test: expected a pair", lambda: prepared(test=X)),
    "no rows": (UserError, "'a': data: y: has no rows", lambda: prepared((X[:0], Y[:0]))),
    "labels of three axes": (
        UserError,
        r"y: expected shape \(N,\) or \(N, L\), got \(40, 2, 2\)",
        lambda: prepared((X, np.zeros((40, 2, 2)))),
    ),
    "pixels out of range": (
        UserError,
        r"pixels must be >= 0, got -.*; pass overrides=\['data.range=MAXIMUM'\]",
        lambda: prepared((-X.astype(int), Y)),
    ),
    "complex numbers": (
        UserError,
        "expected real numbers, got complex64",
        lambda: prepared((torch.zeros(40, 1, 8, 8, dtype=torch.complex64), Y)),
    ),
    "text examples": (
        UserError,
        "x: expected an array of numbers",
        lambda: prepared((np.array(["a"] * 40), Y)),
    ),
    "ragged lists": (
        UserError,
        "x: expected an array of numbers",
        lambda: prepared(([[1, 2], [3]], [0, 1])),
    ),
    "images or series": (
        UserError,
        "may be images or series",
        lambda: prepared((np.zeros((40, 8, 8)), Y)),
    ),
    "missing value": (
        UserError,
        "clients: 'a': data: row 0 has no value",
        lambda: prepared((TABLE * np.nan, Y), test=(TABLE, Y)),
    ),
    "infinite value": (
        UserError,
        "x: row 0: infinite value",
        lambda: prepared((TABLE + np.inf, Y), test=(TABLE, Y)),
    ),
    "iterable data set": (
        TypeError,
        "expected a map-style torch Dataset with __len__, got Stream",
        lambda: prepared(Stream()),
    ),
    "data set without length": (
        TypeError,
        "expected a map-style torch Dataset with __len__, got Unsized",
        lambda: prepared(Unsized()),
    ),
    "data loader": (
        TypeError,
        "expected a pair .*got DataLoader",
        lambda: prepared(DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4)))),
    ),
    "items are dictionaries": (
        UserError,
        r"row 0: expected a pair \(x, y\), got dict",
        lambda: prepared(Items(lambda i: {"x": X[i], "y": Y[i]})),
    ),
    "items of two shapes": (
        UserError,
        r"examples have shapes \(1, 8, 8\) and \(1, 8, 9\)",
        lambda: prepared(Items(lambda i: (np.zeros((1, 8, 8 + i % 2)), 0))),
    ),
    "three tensors": (
        UserError,
        "expected tensors x and y, got 3 tensors",
        lambda: prepared(TensorDataset(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4))),
    ),
    "too few classes": (
        UserError,
        "label 2 is out of range 0 to 1",
        lambda: prepared(num_classes=2),
    ),
    "one class": (UserError, "num_classes: must be >= 2, got 1", lambda: prepared(num_classes=1)),
    "unknown source": (
        UserError,
        "data.name: unknown source 'digitz'; did you mean 'digits'",
        lambda: hfl.Federation([hfl.Client("a", "mlp")], data="digitz").prepare(hfl.Local()),
    ),
    "missing file": (
        UserError,
        "'a': data.path: file 'none.csv' not found",
        lambda: prepared({"name": "table", "path": "none.csv", "label": "y"}),
    ),
}

MODELS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "two outputs": (
        UserError,
        "expected a model that returns logits, got tuple",
        lambda: prepared(model=TwoOutputs()),
    ),
    "two inputs": (
        UserError,
        "missing 1 required positional argument: 'mask'",
        lambda: prepared(model=TwoInputs()),
    ),
    "unknown argument of a class": (
        UserError,
        "cannot create the model: TypeError: .*'depth'",
        lambda: prepared(model=NeedsDepth),
    ),
    "function without a result": (
        UserError,
        "expected a torch.nn.Module, got NoneType",
        lambda: prepared(model=lambda: None),
    ),
    "class of another type": (
        UserError,
        "dict in builtins is not a subclass of torch.nn.Module",
        lambda: prepared(model=dict),
    ),
    "unknown option": (
        UserError,
        "mlp: unknown option 'hiden'; did you mean 'hidden'",
        lambda: hfl.Client("a", {"name": "mlp", "hiden": [3]}),
    ),
    "state dict": (UserError, "model.name: missing", lambda: hfl.Client("a", Net().state_dict())),
    "another number of channels": (
        UserError,
        "cannot process an image of 8x8 pixels",
        lambda: prepared(model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))),
    ),
    "class on another device": (
        UserError,
        "Tensor on device meta is not on the expected device cpu",
        lambda: prepared(model=lambda: Net().to("meta")),
    ),
    "weights on another device": (
        UserError,
        "no weights.*meta.*create it on a device",
        lambda: prepared(model=Net().to("meta")),
    ),
    "unknown head": (
        UserError,
        r"clients: 'a': model: .*head: no submodule 'classifier'; choose from out$",
        lambda: prepared(model=Net(), client={"head": "classifier"}),
    ),
    "misspelled head": (
        UserError,
        "head: no submodule 'cnov'; did you mean 'conv'",
        lambda: prepared(model=Net(), client={"head": "cnov"}),
    ),
    "softmax": (
        UserError,
        "return logits without softmax",
        lambda: prepared(model=nn.Sequential(Net(), nn.Softmax(1))),
    ),
}

SETTINGS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "more clients per round than clients": (
        UserError,
        "per_round: must be <= 1, the number of clients, got 5",
        lambda: prepared(per_round=5),
    ),
    "seed is text": (UserError, "seed: expected an integer, got 'x'", lambda: prepared(seed="x")),
    "unknown default": (
        UserError,
        "defaults.epoch: unknown key; did you mean 'epochs'",
        lambda: prepared(defaults={"epoch": 2}),
    ),
    "partition by name": (
        TypeError,
        "partition: expected a partition such as .* got 'dirichlet'",
        lambda: prepared(partition="dirichlet"),
    ),
    "unknown common prefix": (
        UserError,
        "common: no model has a tensor with prefix 'nothing.'",
        lambda: prepared(common=["nothing."]),
    ),
    "number of class weights": (
        UserError,
        "class_weights: expected 3 numbers.*got 2",
        lambda: prepared(client={"class_weights": [1.0, 2.0]}),
    ),
    "optimizer with parameters": (
        TypeError,
        "got an optimizer of given parameters; pass functools.partial.torch.optim.SGD, lr=...",
        lambda: hfl.Client(
            "a",
            "mlp",
            optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))]),  # type: ignore[arg-type]
        ),
    ),
    "misspelled optimizer": (
        UserError,
        r"Client\('a'\): optimizer.name: unknown value 'adan'; did you mean 'adam'",
        lambda: hfl.Client("a", "mlp", optimizer="adan"),
    ),
    "misspelled section": (
        TypeError,
        r"prepare\(\) got an unexpected keyword argument 'evalution'; did you mean 'evaluation'",
        lambda: hfl.Federation([hfl.Client("a", "mlp", (X, Y))]).prepare(
            evalution=hfl.Evaluation(every=2),  # type: ignore[call-arg]
        ),
    ),
    "class of a section": (
        TypeError,
        r"expected Adam\(...\), got the class Adam; call it",
        lambda: hfl.Client("a", "mlp", optimizer=hfl.Adam),
    ),
    "class of a section of a run": (
        TypeError,
        r"expected Privacy\(...\), got the class Privacy; call it",
        lambda: hfl.Federation([hfl.Client("a", "mlp", (X, Y))]).prepare(
            privacy=hfl.Privacy,  # type: ignore[arg-type]
        ),
    ),
    "loss of values for classes": (
        UserError,
        r"'a': objective: .*; the targets are class numbers of shape \[N\]: use torch.nn.Cross",
        lambda: prepared(client={"objective": nn.MSELoss()}),
    ),
    "epochs and steps": (
        UserError,
        r"Client\('a'\): epochs cannot be combined with steps, .* steps=3; set one of them",
        lambda: hfl.Client("a", "mlp", epochs=5, steps=3),
    ),
    "number as name": (
        UserError,
        "name: expected a string, got 5",
        lambda: hfl.Client(5, "mlp"),  # type: ignore[arg-type]
    ),
    "no rounds": (
        UserError,
        "rounds: must be > 0, got 0",
        lambda: hfl.Federation([hfl.Client("a", "mlp", (X, Y))]).train("local", rounds=0),
    ),
}

PROCESSES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "loss that cannot be pickled": (
        UserError,
        r"object:loss: cannot be sent to another process \(cannot pickle '_thread.lock' object\)",
        lambda: train_in_processes(objective=loss_with_a_lock()),
    ),
}

MISTAKES = {**DATA, **MODELS, **SETTINGS, **PROCESSES}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_raises_one_line(mistake: str) -> None:
    check_raises_one_line(MISTAKES[mistake])


@pytest.mark.slow
def test_lambda_is_sent_to_worker_processes() -> None:
    run = train_in_processes(
        objective=lambda z, y: nn.functional.cross_entropy(z, y, reduction="none")
    )

    assert run.summary["rounds_completed"] == 1
