"""Export of a configuration as a Flower app, for `flwr run` on an existing federation."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hetero_fl.config import Config, dump
from hetero_fl.deployment.server import check_deployable
from hetero_fl.deployment.transport import MESSAGE_BYTES
from hetero_fl.experiment.configuration import load_config
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import UserError

PACKAGE = "hetero_fl_app"

# Keys of Flower's run configuration, with their defaults.
RUN_CONFIG: dict[str, str | float | bool] = {
    "out": "",  # run directory; default: runs/<name>-<timestamp>
    "resume": False,
    "overrides": "",  # changes to the configuration, key.path=value, separated by spaces
    "allow-code": False,
    "nodes": "",  # YAML file with the public key file of each client's node
    "wait": 600.0,  # seconds to wait for all clients
    "deadline": 3600.0,  # seconds that a node may take for a task
    "patience": 60.0,  # seconds to wait for a disconnected node while others are connected
    "message-bytes": MESSAGE_BYTES,  # maximum bytes of a node's answer
    "logs": "text",  # format of log lines: text or json
}

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "hetero-fl-app"
version = "1.0.0"
description = "Federated learning with hetero_fl"
license = "Apache-2.0"
# hetero_fl is installed next to Flower at the server and at every site, in one version.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "hetero-fl"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
{settings}
"""

SERVER_APP = '''\
"""ServerApp that trains with the connected nodes, configured by config.yaml."""

from pathlib import Path

from hetero_fl.deployment.flower.server_app import make_server_app

app = make_server_app(Path(__file__).with_name("config.yaml"))
'''

CLIENT_APP = '''\
"""ClientApp that forwards each message to the worker process of its site."""

from hetero_fl.deployment.flower.client_app import app

__all__ = ["app"]
'''


def check_flower() -> None:
    """Check that Flower is installed, without importing Flower.

    Raises:
        UserError: If Flower is not installed, or the operating system is not supported.
    """
    if not hasattr(os, "fork"):
        raise UserError(
            f"deployments need fork and Unix sockets, which {platform.system()} does not have; use "
            "Linux, macOS or the Windows Subsystem for Linux"
        )
    try:
        version("flwr")
    except PackageNotFoundError:
        raise UserError(
            "flwr: not installed; run pip install 'hetero_fl[flower]', which needs Python >= 3.11"
        ) from None


def write_app(
    folder: Path,
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Iterable[str] = (),
    allow_code: AllowCode = False,
) -> list[Path]:
    """Write a Flower app that trains with a configuration.

    Args:
        folder: Output folder, which must be new or empty.
        source: Configuration, or path of a configuration file.
        overrides: Changes to the configuration in the format `key.path=value`.
        allow_code: Whether the configuration may reference code.

    Returns:
        Paths of the written files.

    Raises:
        UserError: If Flower is not installed, the configuration is invalid or requires a
            simulation, or the folder is not empty.
    """
    check_flower()
    config = load_config(source, overrides, allow_code)
    check_deployable(config)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already exists; choose a new folder")
    settings = [f"{key} = {json.dumps(value)}" for key, value in RUN_CONFIG.items()]
    contents = {
        "pyproject.toml": PROJECT.format(package=PACKAGE, settings="\n".join(settings)),
        f"{PACKAGE}/__init__.py": "",
        f"{PACKAGE}/server_app.py": SERVER_APP,
        f"{PACKAGE}/client_app.py": CLIENT_APP,
        f"{PACKAGE}/config.yaml": dump(config),
    }
    (folder / PACKAGE).mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in contents]
