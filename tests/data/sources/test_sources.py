"""Embedded, generated and in-memory sources, and the registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hetero_fl.data
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.task import Task
from hetero_fl.data import (
    Dataset,
    Source,
    from_arrays,
    list_sources,
    load_source,
    make_images,
    make_table,
    register_source,
    with_test,
)
from hetero_fl.data.registry import sources
from hetero_fl.experiment import prepare
from tests.support.benchmark_folders import write_client_folder, write_iwildcam
from tests.support.mistakes import check_refused, refusal
from tests.support.movielens_folders import write_movielens_folder
from tests.support.speech_folders import write_speech_folder


def test_chest_xray_is_embedded(tmp_path: Path) -> None:
    dataset = load_source(SourceConfig(), tmp_path)
    assert dataset.validation is not None and dataset.test is not None
    counts = [torch.bincount(s.y).tolist() for s in dataset.splits().values() if s.y is not None]
    assert counts == [[516, 1484], [52, 148], [234, 390]]
    assert dataset.train.x.shape == (2000, 1, 28, 28) and dataset.train.x.dtype == torch.uint8
    assert 120 < dataset.train.x.float().mean() < 160  # X-rays, neither blank nor inverted
    assert "CC BY 4.0" in dataset.about and not dataset.simulated
    assert not list(tmp_path.iterdir())
    embedded = Path(hetero_fl.data.__file__).parent / "embedded"
    assert (embedded / "chest_xray.npz").stat().st_size < 2.2e6
    assert "CC BY 4.0" in (embedded / "LICENSE.md").read_text()


def test_generated_sets_are_marked_and_learnable(tmp_path: Path) -> None:
    for name in ("synthetic_images", "synthetic_table"):
        first, again = (load_source(SourceConfig(name=name), tmp_path) for _ in range(2))
        assert (
            first.simulated
            and first.test is not None
            and len(first.train) == 1200
            and len(first.test) == 400
        )
        assert torch.equal(first.train.x, again.train.x)
    images = make_images(classes=3, channels=3, side=12, seed=4)
    assert images.train.x.shape == (1200, 3, 12, 12)
    x, y = images.train.x.float().flatten(1), images.train.y
    assert images.test is not None and y is not None and images.test.y is not None
    middle = torch.stack([x[y == c].mean(0) for c in range(3)])
    nearest = torch.cdist(images.test.x.float().flatten(1), middle).argmin(1)
    assert (nearest == images.test.y).float().mean() > 0.95
    for kind in ("multilabel", "regression"):
        table = make_table(kind=kind, outputs=2)
        assert (
            table.train.y is not None
            and table.train.y.shape == (1200, 2)
            and len(table.columns) == 10
        )


def test_digits_equal_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = load_source(SourceConfig(name="digits"), tmp_path)

    train = dataset.train
    assert train.x.shape == (1797, 1, 8, 8) and train.x.dtype == torch.uint8
    assert torch.equal(train.labels, torch.from_numpy(bunch.target).long())
    assert torch.equal(train.x[:, 0].double(), torch.from_numpy(bunch.images * (255 / 16)).round())
    assert dataset.task == Task("multiclass", 10) and dataset.test is None
    files = {"npz", "table", "image_folder"}
    assert {"chest_xray", "digits", "cifar100", "chestmnist", *files} <= set(list_sources())


def test_source_can_be_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_source.py").write_text(
        "import torch\n"
        "from hetero_fl.data import from_arrays\n"
        "from hetero_fl.utils.errors import UserError\n"
        "def good(config, root): return "
        "from_arrays(torch.zeros(6, 2), [0, 1] * 3, name=str(config.path))\n"
        "def none(config, root): return 3\n"
        "def sorry(config, root): raise UserError('no licence')\n"
        "def fails(config, root): return [][1]\n"
        "constant = 3\n"
    )
    assert (
        load_source(SourceConfig(name="python:own_source:good", path="there.npz"), tmp_path).name
        == "there.npz"
    )
    for name, words in (
        ("none", "got int"),
        ("sorry", "no licence"),
        ("fails", "python:own_source:fails raised IndexError: list index"),
        ("constant", r"is not a function of \(config, root\) that 'own_source' defines"),
        ("god", "'good'"),
    ):
        check_refused(words, load_source, SourceConfig(name=f"python:own_source:{name}"), tmp_path)
    unknown = SourceConfig.model_validate({"name": "python:own_source:good", "labell": "y"})
    check_refused(
        r"^data\.labell: unknown key; did you mean 'label'", load_source, unknown, tmp_path
    )


def test_source_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_known", dict(sources._known))

    def broken(config: SourceConfig, root: Path) -> Dataset:
        dataset = make_table(rows=40, test_rows=9)
        dataset.train.x[7, 3] = float("nan")
        return dataset

    register_source("mine")(broken)
    check_refused(
        r"data\.name: mine: train: x: row 7: NaN or infinite value",
        load_source,
        SourceConfig(name="mine"),
        Path(),
    )
    with pytest.raises(ValueError, match="'digits' is a built-in data source"):
        register_source("digits")(broken)


def test_source_can_be_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_known", dict(sources._known))

    @register_source("numbers")
    class Numbers(Source):
        size: int = 8

        def read(self, root: Path, labeled: bool = True) -> Dataset:
            return from_arrays(torch.eye(self.size), torch.arange(self.size) % 2)

    assert len(load_source(SourceConfig(name="numbers"), Path()).train) == 8
    assert len(load_source(SourceConfig(name="numbers", size=4), Path()).train) == 4
    words = r"data\.label: does not apply to source numbers"
    check_refused(words, load_source, SourceConfig(name="numbers", label="y"), Path())


def test_class_validates_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_class.py").write_text(
        "import torch\n"
        "from pydantic import PositiveInt\n"
        "from hetero_fl.data import Source, from_arrays\n"
        "class Steps(Source):\n"
        "    steps: PositiveInt = 3\n"
        "    def read(self, root, labeled=True):\n"
        "        return from_arrays(torch.rand(80, self.steps, 1), torch.arange(80) % 2)\n"
    )
    (tmp_path / "steps.yaml").write_text(
        "data: {name: python:own_class:Steps, steps: 5}\n"
        "clients: {count: 2, defaults: {model: gru}}\n"
    )

    check_refused("names code; pass allow_code=True", prepare, "steps.yaml", ["data.steps=0"])
    assert "own_class" not in sys.modules
    data = prepare("steps.yaml", allow_code=True).data

    assert data.raw_examples("common_test").shape[1:] == (5, 1)
    for override, words in (
        ("steps=0", r"^data\.steps: must be > 0, got 0"),
        ("stepz=5", r"^data\.stepz: unknown key; did you mean 'steps'"),
        ("patient=who", r"^data\.patient: does not apply to source python:own_class:Steps; remove"),
        ("proxy.source={name: python:own_class:Steps, steps: 0}", r"^data\.proxy\.source\.steps: "),
    ):
        changes = [f"data.{override}"]
        check_refused(words, prepare, "steps.yaml", changes, allow_code=True)
    with pytest.raises(TypeError, match=r"Own\.split: data\.split is a setting of every source"):
        type("Own", (Source,), {"__annotations__": {"split": float}})


def test_missing_test_set_is_split_from_training_rows() -> None:
    x = torch.arange(50.0)[:, None]
    dataset = with_test(from_arrays(x, x.flatten().long() % 2, group=["g"] * 50))
    assert dataset.test is not None and dataset.test.y is not None
    assert len(dataset.test) == 10 and torch.equal(
        dataset.test.y, dataset.test.x.flatten().long() % 2
    )
    both = torch.cat([dataset.test.x, dataset.train.x]).flatten().sort().values
    assert torch.equal(both, torch.arange(50.0))
    assert with_test(dataset) is dataset
    check_refused("too few", with_test, from_arrays(x[:2], [0, 1]))


def test_path_as_source_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()
    for layout in ("100k", "1m", "latest"):
        write_movielens_folder(tmp_path / f"ml-{layout}", layout)
    write_speech_folder(tmp_path / "words")
    write_iwildcam(tmp_path / "cameras")
    write_client_folder(tmp_path / "clients")

    for name, expected in (
        ("registry.csv", "file 'registry.csv'; set data.name=table and data.path=registry.csv"),
        ("mine.npz", "file 'mine.npz'; set data.name=npz and data.path=mine.npz"),
        ("scans", "folder 'scans'; set data.name=image_folder and data.path=scans"),
        ("ml-100k", "folder 'ml-100k'; set data.name=movies and data.path=ml-100k"),
        ("ml-1m", "folder 'ml-1m'; set data.name=movies and data.path=ml-1m"),
        ("ml-latest", "folder 'ml-latest'; set data.name=movies and data.path=ml-latest"),
        ("words", "folder 'words'; set data.name=speech and data.path=words"),
        ("cameras", "folder 'cameras'; set data.name=iwildcam and data.path=cameras"),
        ("clients", "folder 'clients'; set data.name=htfllib and data.path=clients"),
    ):
        with subtests.test(name=name, expected=expected):
            assert (
                refusal(load_source, SourceConfig(name=name), tmp_path)
                == f"data.name: expected a source, got the {expected}"
            )
