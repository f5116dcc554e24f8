"""ServerApp that trains over Flower's grid, and the transport over the grid."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp
from typing_extensions import override

from hetero_fl.config import Config
from hetero_fl.config.load import read_config_file
from hetero_fl.deployment.flower.app import RUN_CONFIG
from hetero_fl.deployment.flower.client_app import from_message, to_content
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node_files import load_public_key, public_bytes
from hetero_fl.deployment.server import run_federation
from hetero_fl.deployment.transport import (
    Envelope,
    SentMessage,
    ThreadedTransport,
    UnreadableAnswer,
)
from hetero_fl.experiment.configuration import load_config
from hetero_fl.experiment.runner import default_out
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import RunFailedError, UserError, one_line

# Share of the available memory that the process of the ServerApp may use.
MEMORY_SHARE = 0.8
# Bounds and growth of the interval in seconds at which an answer is polled.
MIN_PAUSE = 0.05
MAX_PAUSE = 0.5
PAUSE_GROWTH = 1.15
# Seconds between checks of the connected nodes while answers are pending.
NODES_SECONDS = 2.0


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
    """Check the types of Flower's run configuration, and add defaults."""
    settings = {**RUN_CONFIG, **run_config}
    for key, default in RUN_CONFIG.items():
        kind = type(default)
        if type(settings[key]) is not kind and not (kind is float and type(settings[key]) is int):
            raise UserError(f"run-config: {key}: expected {kind.__name__}, got {settings[key]!r}")
    return settings


def _load_keys(file: Path) -> dict[str, bytes]:
    """Load the public key of each client's node from paths relative to `file`."""
    raw = read_config_file(file)
    for client, path in raw.items():
        if not isinstance(path, str):
            raise UserError(f"{file}: {client}: expected a file with a public key, got {path!r}")
    return {
        client: public_bytes(load_public_key(file.parent / path)) for client, path in raw.items()
    }


class GridTransport(ThreadedTransport):
    """Transport over the grid of a running ServerApp.

    A node that restarts keeps its Flower ID but loses the messages that it has received, so the
    node gets a new number. Each answer is pulled in a thread of its own, because Flower blocks
    while a node is sending an answer and returns each answer only once, even if the answer cannot
    be decoded.

    Args:
        grid: The grid that Flower passes to the ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self._grid = grid
        # Node numbers, keyed by (Flower ID, time of activation).
        self._known: dict[tuple[int, str], int] = {}

    def nodes(self) -> Mapping[int, bytes]:
        """Return the public keys of the connected nodes in PEM format, keyed by node number.

        Raises:
            RunFailedError: If the SuperLink does not respond or Flower has stopped the run.
        """
        try:
            found = list(self._grid.get_nodes())
        except BaseException as error:
            raise _failure(error) from None
        present: dict[tuple[int, str], int] = {}
        keys: dict[int, bytes] = {}
        for info in found:
            identity = (info.node_id, getattr(info, "last_activated_at", ""))
            number = self._known.get(identity) or next(self._numbers)
            present[identity] = number
            keys[number] = getattr(info, "public_key", b"")
        self._known = present
        # Threads of lost messages go on, so that Flower deletes answers that arrive later.
        self._sent = {n: m for n, m in self._sent.items() if m.node in keys or m.answer.done()}
        return keys

    def push(self, node: int, envelope: Envelope, within: float) -> str:
        """Send a message to a node and return the ID of the message (see `Transport.push`).

        Raises:
            RunFailedError: If the SuperLink does not respond or Flower has stopped the run.
        """
        flower_ids = {number: flower_id for (flower_id, _), number in self._known.items()}
        sent: list[str] = []
        if node in flower_ids:
            content = to_content(envelope)
            message = Message(content, flower_ids[node], MessageType.QUERY, ttl=within)
            try:
                sent = list(self._grid.push_messages([message]))
            except BaseException as error:
                raise _failure(error) from None
        if not sent or not sent[0]:
            return f"lost-{next(self._numbers)}"
        self._sent[sent[0]] = SentMessage(node, time.monotonic() + within)
        return sent[0]

    @override
    def pull(self, numbers: Collection[str], wait: float) -> dict[str, Envelope | None]:
        """Return the answers that have arrived (see `Transport.pull`)."""
        deadline = time.monotonic() + wait
        self._start_threads()
        while True:
            remaining = max(0.0, deadline - time.monotonic())
            answers = super().pull(numbers, min(remaining, NODES_SECONDS))
            if answers or remaining <= 0 or not numbers:
                return answers
            self.nodes()

    def close(self) -> None:
        """Discard all messages.

        The grid stays open, because Flower closes it.
        """
        self._sent.clear()

    def _start_threads(self) -> None:
        """Start a thread for each new message, which pulls the answer."""
        for number, message in self._sent.items():
            if not message.answer.running() and not message.answer.done():
                message.answer.set_running_or_notify_cancel()
                threading.Thread(target=self._poll, args=(number, message), daemon=True).start()

    def _poll(self, number: str, message: SentMessage) -> None:
        """Pull an answer in a thread until it arrives or the message expires."""
        pause = MIN_PAUSE
        try:
            while not (found := list(self._grid.pull_messages([number]))):
                if time.monotonic() >= message.expires:
                    break
                time.sleep(pause)
                pause = min(pause * PAUSE_GROWTH, MAX_PAUSE)
            message.answer.set_result(from_message(found[0]) if found else None)
        except BaseException as error:
            self._set_failure(message, error)

    def _set_failure(self, message: SentMessage, error: BaseException) -> None:
        """Set the answer to a message whose pull failed.

        If the SuperLink still responds, the node sent an answer that cannot be decoded.
        """
        try:
            if not isinstance(error, Exception):
                raise error
            list(self._grid.get_nodes())
        except BaseException as failure:
            message.answer.set_exception(_failure(failure))
        else:
            reason = one_line(f"{type(error).__name__}: {error}")
            message.answer.set_result(UnreadableAnswer.with_reason(reason))


def _failure(error: BaseException) -> RunFailedError:
    """Convert an error of Flower to a RunFailedError, or raise it again if it is an interrupt."""
    # This class is not public and not a subclass of Exception.
    if type(error).__name__ == "RunNotRunningException":
        return RunFailedError("Flower has stopped the run")
    if not isinstance(error, Exception):
        raise error
    return RunFailedError(f"Flower's SuperLink does not answer ({one_line(error)})")
