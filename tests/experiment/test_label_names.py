"""Evaluation of saved models: labels are matched to classes by name, in all interfaces."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hetero_fl as hfl
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.task import Task
from hetero_fl.data import from_arrays
from hetero_fl.utils.errors import UserError
from tests.support import python_federations
from tests.support.python_federations import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:.*are also in the run's training rows:UserWarning")
NAMES = np.array(["sick", "healthy"])


rows = partial(python_federations.rows, width=2, gap=4)


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> hfl.Run:
    x, y = rows(120)
    clients = [hfl.Client("a", "linear", (x, NAMES[y])), hfl.Client("b", "linear", (x, NAMES[y]))]
    defaults = ClientSettings(optimizer=hfl.SGD(lr=0.5), epochs=5)
    own = hfl.Federation(clients, defaults=defaults)
    path = tmp_path_factory.mktemp("named") / "run"
    return own.train(hfl.FedAvg(), rounds=3, out=path, overrides=QUIET)


def accuracy(run: hfl.Run, data: Any, **options: Any) -> float:
    return float(hfl.evaluate(run, data, client="a", **options)["a"]["accuracy"])


def test_evaluate_matches_names_or_refuses_them(named_run: hfl.Run, tmp_path: Path) -> None:
    x, y = rows(80, 1)
    probabilities = named_run.predict("a", x, personal=False)
    assert tuple(probabilities.columns) == named_run.models["a"].task.names
    predicted = probabilities.idxmax(axis=1)
    expected = float((predicted == NAMES[y]).mean())
    frame = pd.DataFrame(x, columns=["u", "v"])
    frame.assign(y=NAMES[y]).to_csv(tmp_path / "named.csv", index=False)
    frame.assign(y=y).to_csv(tmp_path / "numbered.csv", index=False)
    np.savez(tmp_path / "numbered.npz", train_images=x, train_labels=y)

    assert expected > 0.9
    for data in ((x, NAMES[y]), (torch.tensor(x), list(NAMES[y])), str(tmp_path / "named.csv")):
        assert accuracy(named_run, data, label="y" if isinstance(data, str) else None) == expected
    healthy = y == 1
    assert accuracy(named_run, (x[healthy], NAMES[y][healthy])) > 0.9
    wrong = [(x, y), (x, y + 1), (x, y * 1.0), (x, np.array(["Sick", "Healthy"])[y])]
    files = [str(tmp_path / "numbered.csv"), str(tmp_path / "numbered.npz")]
    for data in (*wrong, frame.assign(y=y), *files):
        is_table = isinstance(data, pd.DataFrame) or str(data).endswith(".csv")
        with pytest.raises(UserError, match=r"expected class names as in|unknown") as caught:
            accuracy(named_run, data, label="y" if is_table else None)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected class names as in"):
        hfl.join(named_run, (x, y), out=tmp_path / "joined")


@pytest.mark.parametrize("trained_on", ["numbers", "names"])
def test_labels_of_a_task_with_names_are_spelled_as_in_training(
    trained_on: str, tmp_path: Path
) -> None:
    x, y = rows(80)
    names = NAMES[y]
    task = Task("multiclass", 2, tuple(NAMES))
    given = {"numbers": y, "names": names}
    clients = [hfl.Client("a", "linear", (x, given[trained_on]))]
    defaults = ClientSettings(optimizer=hfl.SGD(lr=0.5), epochs=5)
    own = hfl.Federation(clients, task=task, defaults=defaults)
    run = own.train(hfl.Local(), rounds=2, out=tmp_path / "run", overrides=QUIET)
    predicted = run.predict("a", x, personal=False).to_numpy().argmax(1)
    loaded = hfl.Run.load(run.path)

    assert accuracy(loaded, (x, names)) == float((predicted == y).mean()) > 0.9
    if trained_on == "numbers":
        assert accuracy(loaded, (x, y)) == accuracy(loaded, (x, names))
    else:
        with pytest.raises(UserError, match="expected class names as in"):
            accuracy(loaded, (x, y))


@pytest.mark.parametrize(
    "clients",
    [
        lambda x, y, task: hfl.split((x, y), ["a"], model="linear", task=task),
        lambda x, y, task: hfl.split(from_arrays(x, y), ["a"], model="linear", task=task),
        lambda x, y, task: [hfl.Client("a", "linear", from_arrays(x, y, task=task))],
    ],
)
def test_numbers_of_a_task_with_names_are_accepted_however_the_task_is_given(clients: Any) -> None:
    x, y = rows(80)
    task = Task("multiclass", 2, tuple(NAMES))
    run = hfl.Federation(clients(x, y, task)).train(hfl.Local(), rounds=1, overrides=QUIET)

    predicted = run.predict("a", x, personal=False).to_numpy().argmax(1)

    assert accuracy(run, (x, y)) == accuracy(run, (x, NAMES[y])) == (predicted == y).mean()


def test_evaluate_matches_numbers_by_value(tmp_path: Path) -> None:
    x, y = rows(120)
    clients = [hfl.Client("a", "linear", (x, 3 * y + 1)), hfl.Client("b", "linear", (x, 3 * y + 1))]
    own = hfl.Federation(clients, defaults=ClientSettings(optimizer=hfl.SGD(lr=0.5), epochs=5))
    run = own.train(hfl.FedAvg(), rounds=3, out=tmp_path / "run", overrides=QUIET)

    assert run.models["a"].task.names == ("1", "4")
    assert accuracy(run, (x, 3 * y + 1)) == accuracy(run, (x, (3 * y + 1) * 1.0)) > 0.9
    frame = pd.DataFrame(x, columns=["u", "v"]).assign(y=3 * y + 1)
    assert accuracy(run, frame, label="y") > 0.9
    for data in ((x, y), (x, NAMES[y])):
        with pytest.raises(UserError, match="is unknown to the models"):
            accuracy(run, data)


def test_evaluate_reads_class_folders_in_folders_of_sites(tmp_path: Path) -> None:
    for site in ("train", "north", "south"):
        for name, value in (("normal", 0), ("ill", 200)):
            folder = tmp_path / ("train" if site == "train" else f"sites/{site}") / name
            folder.mkdir(parents=True)
            for i in range(30):
                pixels = np.full((6, 6), value + i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    source = {"name": "image_folder", "path": str(tmp_path / "train")}
    config = {
        "data": source,
        "clients": {"groups": [{"name": "c", "count": 2, "model": "linear"}]},
        "rounds": 1,
        "output": {"plots": False, "report": False},
    }
    run = hfl.run(config, out=tmp_path / "run", quiet=True)

    scores = hfl.evaluate(run, str(tmp_path / "sites"), client="c_1")["c_1"]
    of_site = hfl.evaluate(run, str(tmp_path / "sites" / "north"), client="c_1")["c_1"]

    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "sites/north/ill/x.png")
    with pytest.raises(UserError, match=r"^data: .*x\.png: expected 6x6 pixels .*, got 9x9$"):
        hfl.evaluate(run, str(tmp_path / "sites"))
    # Both sites have the same images.
    assert scores["loss"] == pytest.approx(of_site["loss"])
    assert scores["accuracy"] == of_site["accuracy"]
