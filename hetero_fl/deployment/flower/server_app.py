"""ServerApp that trains over Flower's grid."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hetero_fl.config import Config
from hetero_fl.config.load import read_config_file
from hetero_fl.deployment.flower.app import RUN_CONFIG
from hetero_fl.deployment.flower.grid import GridTransport
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node_keys import load_public_key, public_bytes
from hetero_fl.deployment.server import run_federation
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.runner import default_out
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import RunFailedError, UserError, suggest_or_list

# Share of the available memory that the process of the ServerApp may use.
MEMORY_SHARE = 0.8


def make_server_app(config: Path) -> ServerApp:
    """Create the ServerApp that trains with a configuration.

    Args:
        config: Path of the configuration in YAML or JSON format.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        limit_memory()
        try:
            run_in_app(grid, context.run_config, config)
        except (UserError, RunFailedError):
            # Flower logs the exception; the message is sufficient without a traceback.
            sys.tracebacklimit = 0
            raise

    return app


def run_in_app(
    grid: Grid, run_config: Mapping[str, Any], source: str | Path | Mapping[str, Any] | Config
) -> Run:
    """Train with the nodes of a grid.

    Args:
        grid: Flower's grid.
        run_config: Flower's run configuration. Missing keys have the defaults in `RUN_CONFIG`.
        source: Configuration, or path of a configuration file.

    Returns:
        The finished run.

    Raises:
        UserError: If the configuration or `run_config` is invalid.
        RunFailedError: If a node is missing, or the run cannot continue.
    """
    settings = _read_settings(run_config)
    if settings["logs"] not in ("text", "json"):
        raise UserError(f"run-config: logs: expected text or json, got {settings['logs']!r}")
    log = EventLog(settings["logs"])
    overrides = str(settings["overrides"]).split()
    out = Path(settings["out"]) if settings["out"] else None
    if settings["resume"] and out is None:
        raise UserError("run-config: resume requires out, the directory of the run")
    if settings["resume"] and out is not None and (out / "config.yaml").exists():
        source = out / "config.yaml"
    config = load_config(source, overrides, bool(settings["allow-code"]))
    out = out or default_out(config)
    log(f"run directory: {out.resolve()}")
    run = run_federation(
        config,
        GridTransport(grid),
        out=out,
        resume=bool(settings["resume"]),
        wait=float(settings["wait"]),
        deadline=float(settings["deadline"]),
        keys=_load_keys(Path(settings["nodes"])) if settings["nodes"] else None,
        patience=float(settings["patience"]),
        quiet=False,
        log=log,
        message_bytes=int(settings["message-bytes"]),
    )
    log(f"done: {out.resolve()}")
    return run


def limit_memory() -> None:
    """Limit the memory of this process to `MEMORY_SHARE` of what is available.

    A small Flower message can expand to a large one, because an array may refer to the same chunk
    several times. With the limit, reading such a message fails, and other messages are not
    affected. On systems other than Linux, no limit is set.
    """
    if sys.platform != "linux":
        return
    # Windows does not have this module.
    import resource

    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    sizes = Path("/proc/self/statm").read_text().split()
    limit = int(sizes[5]) * resource.getpagesize() + int(MEMORY_SHARE * available)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _read_settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Validate Flower's run configuration and add defaults."""
    for key, value in run_config.items():
        if key not in RUN_CONFIG:
            raise UserError(f"run-config: unknown key '{key}'{suggest_or_list(key, RUN_CONFIG)}")
        kind = type(RUN_CONFIG[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"run-config: {key}: expected {kind.__name__}, got {value!r}")
    return {**RUN_CONFIG, **run_config}


def _load_keys(file: Path) -> dict[str, bytes]:
    """Load the public key of each client's node from paths relative to `file`."""
    raw = read_config_file(file)
    for client, path in raw.items():
        if not isinstance(path, str):
            raise UserError(f"{file}: {client}: expected a file with a public key, got {path!r}")
    return {
        client: public_bytes(load_public_key(file.parent / path)) for client, path in raw.items()
    }
