"""Types of data and models that a federation accepts, and data sets that it does not copy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split

import hetero_fl as hfl
from hetero_fl.data import from_arrays
from hetero_fl.experiment import PreparedRun
from tests.support.python_federations import QUIET, Net, images, table, tensors


def trained(own: hfl.Federation) -> hfl.Run:
    return own.train(hfl.Local(), rounds=1, overrides=QUIET)


def rows_of(prepared: PreparedRun, part: str = "train") -> Any:
    return prepared.data.client_rows["a"][part].examples


# Images: the same rows as `images(40, 1)` in each type


class Pairs(Dataset[Any]):
    """A map-style data set of lists."""

    def __init__(self) -> None:
        self.x, self.y = images(40, 1)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> list[Any]:
        return [self.x[i], np.int64(self.y[i])]


def halves() -> list[TensorDataset]:
    x, y = tensors(40, 1)
    return [TensorDataset(x[:25], y[:25]), TensorDataset(x[25:], y[25:])]


IMAGES: dict[str, Callable[[], Any]] = {
    "uint8 arrays": lambda: images(40, 1),
    "channels last": lambda: (images(40, 1)[0][..., None], images(40, 1)[1]),
    "tensors": lambda: tensors(40, 1),
    "list of labels": lambda: (images(40, 1)[0], images(40, 1)[1].tolist()),
    "TensorDataset": lambda: TensorDataset(*tensors(40, 1)),
    "Subset": lambda: Subset(TensorDataset(*tensors(40, 1)), range(40)),
    "Dataset": lambda: from_arrays(*images(40, 1), num_classes=3),
    "items as pairs": lambda: Subset([*zip(*tensors(40, 1), strict=True)], range(40)),
    "list of arrays": lambda: list(images(40, 1)),
    "int64 pixels": lambda: (images(40, 1)[0].astype(np.int64), images(40, 1)[1]),
    "labels as a column": lambda: (images(40, 1)[0], images(40, 1)[1][:, None]),
    "one-hot labels": lambda: (images(40, 1)[0], np.eye(3, dtype=np.int64)[images(40, 1)[1]]),
    "small integer labels": lambda: (images(40, 1)[0], images(40, 1)[1].astype(np.uint8)),
    "strided array": lambda: (np.repeat(images(40, 1)[0], 2, axis=2)[:, :, ::2], images(40, 1)[1]),
    "array and tensor": lambda: (images(40, 1)[0], tensors(40, 1)[1]),
    "nested lists": lambda: (images(40, 1)[0].tolist(), images(40, 1)[1].tolist()),
    "tensors channels last": lambda: (
        tensors(40, 1)[0].to(memory_format=torch.channels_last),
        tensors(40, 1)[1],
    ),
    "ConcatDataset": lambda: ConcatDataset(halves()),
    "items as lists": Pairs,
}


def test_images_of_each_type_are_the_same_rows(subtests: pytest.Subtests) -> None:
    x, y = tensors(40, 1)
    for way, make in IMAGES.items():
        with subtests.test(way=way):
            clients = [hfl.Client("a", "mlp", make()), hfl.Client("b", "linear", images(40, 2))]
            own = hfl.Federation(clients, test=images(30, 9), num_classes=3)

            rows = rows_of(own.prepare(hfl.Local()))

            assert rows.x.dtype == torch.uint8 and torch.equal(rows.x, x)
            assert torch.equal(rows.y, y)
            assert set(trained(own).models) == {"a", "b"}


def test_fractions_are_images_of_floats() -> None:
    x, y = images(40, 1)
    own = hfl.Federation([hfl.Client("a", "mlp", (x[:, None] / 255, y))], test=images(30, 9))

    rows = rows_of(own.prepare(hfl.Local()))

    assert torch.allclose(rows.x, torch.from_numpy(x)[:, None].float() / 255)


def test_subset_of_random_split_keeps_its_rows() -> None:
    x, y = tensors(60, 1)
    part, rest = random_split(TensorDataset(x, y), [40, 20], torch.Generator().manual_seed(0))

    own = hfl.Federation([hfl.Client("a", "mlp", part)], test=rest)

    rows = rows_of(own.prepare(hfl.Local()))
    assert torch.equal(rows.x, x[part.indices]) and torch.equal(rows.y, y[part.indices])


# Other kinds of data


def numbers(rows: int, seed: int) -> np.ndarray:
    frame = table(rows, seed)[["age", "dose"]]
    return np.ascontiguousarray(frame.to_numpy("float32"))


def multilabel(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = numbers(rows, seed)
    return x, (x > 0.5).astype(np.float32)


def regression(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = numbers(rows, seed)
    return x, x[:, 0] * 2 + 0.25


def series(rows: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 12, 2)).astype("float32")
    return from_arrays(x, np.arange(rows) % 2, columns=("pulse", "pressure"), num_classes=2)


KINDS: dict[str, tuple[str, str, Callable[[int, int], Any]]] = {
    "table": ("multiclass", "mlp", lambda rows, seed: (numbers(rows, seed), np.arange(rows) % 2)),
    "text labels": (
        "multiclass",
        "mlp",
        lambda rows, seed: (numbers(rows, seed), np.array(["ill", "well"])[np.arange(rows) % 2]),
    ),
    "multilabel": ("multilabel", "mlp", multilabel),
    "regression": ("regression", "mlp", regression),
    "series": ("multiclass", "lstm", series),
}


def test_kinds_of_data(subtests: pytest.Subtests) -> None:
    for kind, (task, model, make) in KINDS.items():
        with subtests.test(kind=kind):
            clients = [hfl.Client(name, model, make(60, i)) for i, name in enumerate("ab")]
            own = hfl.Federation(clients, test=make(40, 9))

            assert own.prepare(hfl.Local()).federation.task.kind == task
            assert trained(own).summary["rounds_completed"] == 1


def test_source_of_each_client_by_name_and_path(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        table(60, i).to_csv(tmp_path / f"{name}.csv", index=False)
    clients = [
        hfl.Client(
            name,
            "mlp",
            {"name": "table", "path": str(tmp_path / f"{name}.csv"), "label": "ill"},
        )
        for name in "ab"
    ]

    prepared = hfl.Federation(clients, test=table(40, 9), label="ill").prepare(hfl.Local())

    assert sum(prepared.data.n_rows("a", part) for part in ("train", "validation", "test")) == 60


# Models


class AskingNet(Net):
    """A model that asks for the channels and the size of the images."""

    def __init__(self, num_classes: int, in_channels: int, input_size: tuple[int, int]) -> None:
        super().__init__(3, num_classes)
        self.asked = (num_classes, in_channels, input_size)


class Makers:
    """A holder of functions that create models."""

    @staticmethod
    def make(num_classes: int) -> nn.Module:
        return Net(6, num_classes)

    def make_wide(self, num_classes: int) -> nn.Module:
        return Net(7, num_classes)


class Tail(nn.Module):
    """A model whose last linear layer is not the head."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(64, 3)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x.flatten(1))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "module": lambda: {"model": Net()},
    "class": lambda: {"model": Net},
    "function": lambda: {"model": lambda num_classes: Net(5, num_classes)},
    "name": lambda: {"model": "cnn_bn_small"},
    "dictionary": lambda: {"model": {"name": "cnn", "width": 4}},
    "SplitModel": lambda: {"model": hfl.SplitModel(nn.Flatten(), nn.Linear(64, 3))},
    "default": lambda: {"model": None},
    "partial": lambda: {"model": functools.partial(Net, 5)},
    "class with arguments": lambda: {"model": AskingNet},
    "static method": lambda: {"model": Makers.make},
    "bound method": lambda: {"model": Makers().make_wide},
    "named head": lambda: {"model": Tail(), "head": "classify"},
    "seeded module": lambda: {"model": Net(), "init": "seeded"},
    "frozen backbone": lambda: {"model": Net().requires_grad_(False).apply(thaw_head)},
    "double precision": lambda: {"model": Net().double()},
    "evaluation mode": lambda: {"model": Net().eval()},
    "nested sequential": lambda: {
        "model": nn.Sequential(
            nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 3)
        )
    },
}


def thaw_head(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.requires_grad_(True)


def test_models_of_each_type_train(subtests: pytest.Subtests) -> None:
    for way, make in MODELS.items():
        with subtests.test(way=way):
            client = hfl.Client("a", data=images(40, 1), **make())
            own = hfl.Federation([client, hfl.Client("b", "linear", images(40, 2))])

            before = own.prepare(hfl.Local()).federation.client_infos["a"].arch
            after = trained(own).models["a"].tensors

            assert {name: tuple(t.shape) for name, t in after.items()} == {
                name: tuple(shape) for name, shape in before.shapes.items()
            }
            assert after["head.weight"].dtype == torch.float32


def test_class_receives_the_arguments_that_it_declares() -> None:
    own = hfl.Federation([hfl.Client("a", AskingNet, images(40, 1))], test=images(30, 9))

    module = trained(own).model("a")

    assert module.asked == (3, 1, (8, 8))


# No copies


def shares_memory(first: Tensor, second: Any) -> bool:
    return np.shares_memory(first.numpy(), np.asarray(second))


def float_images() -> np.ndarray:
    return (images(40, 1)[0][:, None] / 255).astype("float32")


def many(x: Any) -> Any:
    return x, images(40, 1)[1]


UNCOPIED: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "uint8 arrays": lambda: (d := images(40, 1), *d),
    "float32 images": lambda: (d := many(float_images()), *d),
    "float32 table": lambda: (d := many(numbers(40, 1)), *d),
    "tensors": lambda: (d := tensors(40, 1), *d),
    "TensorDataset": lambda: (d := TensorDataset(*tensors(40, 1)), *d.tensors),
    "Dataset": lambda: (d := from_arrays(*images(40, 1), num_classes=3), d.train.x, d.train.y),
}


def test_data_of_a_program_is_not_copied(subtests: pytest.Subtests) -> None:
    for kind, make in UNCOPIED.items():
        data, x, y = make()
        sets: dict[str, Any] = {"test": data, "num_classes": None if kind == "Dataset" else 3}
        alone = hfl.Federation([hfl.Client("a", "mlp", data)], **sets, proxy=data)
        pair = hfl.Federation([hfl.Client(name, "mlp", data) for name in "ab"], **sets)
        divided = hfl.Federation([hfl.Client(name, "mlp") for name in "ab"], data=data, test=data)
        few = ["data.partition.min_size=5"]
        with subtests.test(kind=kind):
            for own in (alone, pair):
                prepared = own.prepare(hfl.FedMD() if own is alone else hfl.Local())

                for part in ("train", "validation", "test"):
                    assert shares_memory(rows_of(prepared, part).x, x)
                public = prepared.data.public_sets
                for name in {"common_test", "proxy"} & public.keys():
                    assert shares_memory(public[name].examples.x, x)
                if not kind.startswith("float32"):
                    assert shares_memory(rows_of(prepared).y, y)
            assert shares_memory(rows_of(divided.prepare(hfl.Local(), overrides=few)).x, x)
