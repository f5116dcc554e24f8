"""Small federations for tests of the data package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hetero_fl.config.clients import ClientSettings, Normalize, PreprocessConfig, ScannerConfig
from hetero_fl.config.data import DataConfig, PartitionConfig, ProxyConfig, SourceConfig
from hetero_fl.data import (
    Dataset,
    FederatedData,
    Preprocess,
    federate,
    from_arrays,
    load_source,
)

PLAIN = Preprocess()
PLAIN_CLIENT = ClientSettings()
THREE = {"a": PLAIN_CLIENT, "b": PLAIN_CLIENT, "c": PLAIN_CLIENT}


def read_source(
    name: str, path: Path | str | None = None, root: Path | None = None, **keys: Any
) -> Dataset:
    """Load a source with its missing values.

    Args:
        name: Name of the source.
        path: The file or folder.
        root: Folder for downloads. Default: the working directory.
        **keys: Further keys of the source.
    """
    found = None if path is None else str(path)
    config = SourceConfig.model_validate({"name": name, "path": found, **keys})
    return load_source(config, root or Path(), missing=True)


def numbered(rows: int = 200, groups: list[str] | None = None, **other: Any) -> Dataset:
    """Return rows with x equal to the row number, negative in the test set."""
    x, y = torch.arange(float(rows))[:, None], torch.arange(rows) % 4
    return from_arrays(x, y, test=(-1 - x[:40], y[:40]), group=groups, **other)


def rows_of(data: FederatedData, owner: str, name: str) -> list[int]:
    return data.columns(owner, name, PLAIN)["x"].flatten().int().tolist()


def everything(data: FederatedData) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Return all columns of all clients after their preprocessing."""
    found = {}
    for client in data.client_ids:
        view = data.preprocess(client)
        for name in ("train", "validation", "test", "proxy", "common_test", "common_validation"):
            if name != "proxy" or data.n_proxy:
                found[client, name] = data.columns(client, name, view)
    found["server", "pooled"] = data.columns("server", "pooled", PLAIN)
    return found


def identical(first: FederatedData, second: FederatedData) -> bool:
    a, b = everything(first), everything(second)
    return a.keys() == b.keys() and all(
        a[k].keys() == b[k].keys() and all(torch.equal(a[k][c], b[k][c]) for c in a[k]) for k in a
    )


def heterogeneous() -> dict[str, ClientSettings]:
    return {
        "one": ClientSettings(
            scanner=ScannerConfig(noise=0.1, blur=0.5), preprocess=PreprocessConfig(normalize="own")
        ),
        "two": ClientSettings(
            preprocess=PreprocessConfig(resize=20, channels=3, normalize=Normalize()), size=3
        ),
        "three": ClientSettings(scanner=ScannerConfig(contrast=0.6, resolution=0.5)),
        "four": PLAIN_CLIENT,
    }


def view(
    images: Dataset, seed: int = 0, clients: dict[str, ClientSettings] | None = None, **other: Any
) -> FederatedData:
    config = DataConfig(
        partition=PartitionConfig(kind="dirichlet"), **{"proxy": ProxyConfig(size=50), **other}
    )
    return federate(images, config, clients or heterogeneous(), seed)
