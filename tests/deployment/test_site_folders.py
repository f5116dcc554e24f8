"""Sites whose data are folders of published benchmarks or of Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hetero_fl.deployment.config import load_site_config
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.server import run_federation
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import RunFailedError
from tests.support.benchmark_folders import (
    write_camelyon17,
    write_client_folder,
    write_femnist,
    write_iwildcam,
    write_shakespeare,
)
from tests.support.loopback import LoopbackTransport
from tests.support.nodes import LONG

SITES = ("north", "south")
Source = Mapping[str, Any]


def federate(folder: Path, common: Source, own: Source, model: str) -> Run:
    """Run a round with two sites, whose site files have the section `own` as `data`.

    Args:
        folder: Folder with the folders of the sites.
        common: Section `data` of the server.
        own: Section `data` of the sites, with paths relative to their site files.
        model: Model of the sites.
    """
    config = {
        "rounds": 1,
        "data": {"partition": {"min_size": 4}, **common},
        "clients": {"groups": [{"name": name, "model": model} for name in SITES]},
        "algorithm": {"name": "fedavg"},
        "runtime": {"executor": "serial", "threads": 1},
        "output": {"plots": False, "report": False},
    }
    transport = LoopbackTransport()
    try:
        for name in SITES:
            file = folder / name / "site.yaml"
            tree = {"client": name, "data": dict(own), "tells": {"errors": True}}
            file.write_text(yaml.safe_dump(tree))
            site, state = load_site_config(file)
            transport.join(Node(site, state, lambda _: None).handle, b"")
        return run_federation(config, transport=transport, out=folder / "run", wait=LONG)
    finally:
        transport.close()


def write_hub_folder(path: Path, rows: int = 60) -> None:
    """Write a table with three classes like `save_to_disk`."""
    datasets = pytest.importorskip("datasets")
    draws = np.random.default_rng(0)
    y = draws.integers(0, 3, rows)
    features = datasets.Features(
        {
            "x": datasets.Sequence(datasets.Value("float32"), length=4),
            "label": datasets.ClassLabel(names=["a", "b", "c"]),
        }
    )
    values = {"x": draws.normal(y[:, None], 0.3, (rows, 4)).tolist(), "label": y.tolist()}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(path))


CASES: dict[str, tuple[Any, str, Source, str]] = {
    "htfllib": (lambda p: write_client_folder(p, 1), "htfllib", {}, "lenet"),
    "leaf, images": (write_femnist, "leaf", {}, "lenet"),
    "leaf, text": (write_shakespeare, "leaf", {}, "text_gru"),
    "camelyon17": (write_camelyon17, "camelyon17", {}, "lenet"),
    "iwildcam": (write_iwildcam, "iwildcam", {"size": 12}, "lenet"),
    "hf": (write_hub_folder, "", {}, "mlp"),
}


@pytest.mark.parametrize("case", CASES)
def test_sites_train_on_folders(case: str, tmp_path: Path) -> None:
    write, name, keys, model = CASES[case]
    for place in ("public", *SITES):
        write(tmp_path / place / "rows")

    public = str(tmp_path / "public" / "rows")
    common = {"name": name, "path": public} if name else {"name": f"hf:{public}"}
    own = {"name": name, "path": "rows"} if name else {"name": "hf:rows"}
    run = federate(tmp_path, {**common, **keys}, {**own, **keys}, model)

    assert [client["id"] for client in run.summary["clients"]] == list(SITES)
    assert run.summary["personal"]["last"]["loss"] is not None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"name": "htfllib", "path": "none"}, "data.path: folder '{site}/none' not found"),
        (
            {"name": "htflib", "path": "rows"},
            "data.name: unknown source 'htflib'; did you mean 'htfllib'?",
        ),
        ({"name": "leaf", "path": "rows"}, "data.path: {site}/rows: "),
        (
            {"name": "htfllib", "path": "rows", "size": 12},
            "data.size: does not apply to source htfllib; remove it",
        ),
        ({"name": "hf:./none"}, "data.name: hf:{site}/none: folder not found"),
        (
            {"name": "hf", "path": "rows"},
            "data.path: does not apply to Hugging Face data sets, got '{site}/rows'; set ",
        ),
    ],
)
def test_mistakes_in_the_data_of_a_site_are_named(
    own: Source, message: str, tmp_path: Path
) -> None:
    if own["name"].startswith("hf:"):
        pytest.importorskip("datasets")
    for place in ("public", *SITES):
        write_client_folder(tmp_path / place / "rows", 1)
    common = {"name": "htfllib", "path": str(tmp_path / "public" / "rows")}

    with pytest.raises(RunFailedError) as caught:
        federate(tmp_path, common, own, "lenet")

    # The site that answers first ends the run.
    refusals = [
        f"{site}: the node refused the run: clients: '{site}': "
        + message.format(site=(tmp_path / site).resolve())
        for site in SITES
    ]
    assert any(refusal in str(caught.value) for refusal in refusals)
    assert "\n" not in str(caught.value)
