"""Runs with images in a mapped file equal runs with images in memory, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetero_fl.core import mapped_tensors
from hetero_fl.data.sources.images import read_image_folder
from hetero_fl.experiment import evaluate, run
from tests.support.federations import MIXED, changed, config
from tests.support.image_folders import make_arrays, make_image_folder
from tests.support.workers import figures, models

QUICK_METHODS = ("fedavg", "hybrid", "centralized")
SLOW_METHODS = ("fedmd", "feddf", "fedgkt", "fedproto", "dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images") / "images", 300)


def streamed(
    folder: Path, method: str = "fedavg", models: Any = MIXED, clients: int = 4, **changes: Any
) -> dict[str, Any]:
    """Return a run on the folder whose decoded images are in a mapped file."""
    source = config(method, models, clients, data__proxy__size=40, **changes)
    source["data"]["partition"]["min_size"] = 5
    source["data"] |= {"name": "image_folder", "path": str(folder), "stream": True}
    source["data"]["root"] = str(folder.parent / "root")
    source["runtime"] = {"executor": "serial", **source["runtime"]}
    source["clients"]["defaults"] |= {"preprocess": {"normalize": "own"}, "augment": {"flip": True}}
    return source


def in_memory(source: dict[str, Any]) -> dict[str, Any]:
    return {**source, "data": {**source["data"], "stream": None}}


def assert_equal_results(first: dict[str, Any], second: dict[str, Any], out: Path) -> None:
    """Check that two runs have the same scores and models, bit for bit."""
    runs = []
    for number, source in enumerate((first, second)):
        run(source, out=out / str(number), quiet=True)
        runs.append((figures(out / str(number)), models(out / str(number))))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "method",
    [
        *QUICK_METHODS,
        *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW_METHODS),
    ],
)
def test_streamed_run_equals_run_in_memory(method: str, folder: Path, tmp_path: Path) -> None:
    source = streamed(folder, method)

    assert_equal_results(source, in_memory(source), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"clients__defaults__scanner": {"blur": 0.7, "resolution": 0.6}},
        {"clients__defaults__preprocess": {"resize": 10, "channels": 1, "normalize": "own"}},
        {"data__partition": {"kind": "drawn", "rows": 40}},
        {"clients__defaults__recalibrate": ["global_test", "local_test"]},
        {"attacks": {"name": "label_flip", "clients": ["site_2"]}},
        {"clients__defaults__scanner": {"noise": 0.1}},
        {"attacks": {"name": "backdoor", "clients": ["site_2"]}},
        {"runtime__executor": "batched"},
        {"runtime": {"executor": "processes", "workers": 2, "threads": 1}},
        {
            "privacy": {"unit": "record", "clip": 1.0, "noise_multiplier": 1.0},
            "clients__defaults__preprocess": {},
            "clients__groups": [{"name": "site", "count": 4, "model": "cnn_gn_small"}],
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_streamed_options_equal_those_in_memory(
    changes: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = changed(streamed(folder), **changes)
    monkeypatch.setattr(mapped_tensors, "SCRATCH_BYTES", 2**10)

    assert_equal_results(source, in_memory(source), tmp_path)


def test_clients_read_folders_of_their_own(folder: Path, tmp_path: Path) -> None:
    own = make_image_folder(tmp_path / "own", 90)
    data = {"name": "image_folder", "path": str(own)}
    source = streamed(folder, "centralized")
    source["clients"]["overrides"] = [{"match": "site_2", "data": {**data, "stream": True}}]
    reference = in_memory(source)
    reference["clients"] = {**source["clients"], "overrides": [{"match": "site_2", "data": data}]}

    assert_equal_results(source, reference, tmp_path)


def test_streamed_arrays_equal_arrays_in_memory(tmp_path: Path) -> None:
    images, labels = make_arrays(200)
    for name, values in (("train_images", images), ("train_labels", labels)):
        np.save(tmp_path / f"{name}.npy", values)
    source = streamed(tmp_path)
    source["data"]["name"] = "npz"

    assert_equal_results(source, in_memory(source), tmp_path)


def test_finished_run_is_evaluated_on_streamed_images(folder: Path, tmp_path: Path) -> None:
    finished = run(streamed(folder), out=tmp_path / "run", quiet=True)

    with pytest.warns(UserWarning, match="108 of the 300 rows"):
        scores = evaluate(finished, str(folder))
    with pytest.warns(UserWarning, match="108 of the 300 rows"):
        assert evaluate(finished, read_image_folder(folder)) == scores


# Prints the peak of the anonymous memory of a run, in MB.
MEASURED_RUN = """
import json, re, sys, threading, time
from hetero_fl.experiment import run

peak = 0

def watch():
    global peak
    while True:
        status = open("/proc/self/status").read()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
source, out = json.loads(sys.argv[1]), sys.argv[2]
run(source, out=out, quiet=True)
print(peak / 1024)
"""


def peak_memory(source: dict[str, Any], out: Path) -> float:
    """Return the peak of the anonymous memory of a run in a process of its own, in MB."""
    source["clients"]["groups"][0] |= {"model": "linear", "count": 4}
    source["rounds"] = 1
    source["data"] |= {"train_limit": None, "test_limit": None}
    command = [sys.executable, "-c", MEASURED_RUN, json.dumps(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    # In memory, preprocessed images alone take 147 MB.
    few = make_image_folder(tmp_path / "few", 200, side=64)
    many = make_image_folder(tmp_path / "many", 3000, side=64)

    baseline = peak_memory(streamed(few), tmp_path / "0")

    assert peak_memory(streamed(many), tmp_path / "1") - baseline < 250
