"""The worker process of a site, which answers messages and keeps models and data in memory.

Under `hetero-fl node` it is that command, which runs Flower's SuperNode as a child. Under a
SuperNode that was started without it, `worker_socket.py` starts it at the first message.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from hetero_fl.data import check_source
from hetero_fl.deployment.certificates import check_authority, load_node_key
from hetero_fl.deployment.config import SiteConfig, load_site_config
from hetero_fl.deployment.flower.commands import check_installed
from hetero_fl.deployment.flower.supernode import SuperNode
from hetero_fl.deployment.flower.worker_socket import LISTENING, listen, receive, send
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.transport import Envelope
from hetero_fl.reporting.run_directory import lock_folder
from hetero_fl.utils.code_permission import CodePermission
from hetero_fl.utils.errors import RunFailedError, UserError, one_line
from hetero_fl.utils.processes import is_process_running

POLL_SECONDS = 0.2  # seconds between two looks whether to stop
DELIVERY_SECONDS = 3.0  # seconds that Flower may take to send the last answer
PARENT_SECONDS = 0.5  # between two looks whether the parent process still runs


def run_node(
    path: Path,
    once: bool = False,
    allow_code: bool | CodePermission = False,
    *,
    quiet: bool = False,
    launcher: Path | None = None,
    scratch: Path | None = None,
) -> bool:
    """Run a site with a SuperNode of its own until SIGTERM, and finish the task in hand.

    A second SIGTERM, or Ctrl-C, ends it at once.

    Args:
        path: The site's file.
        once: Whether to end when a run is over.
        allow_code: Whether to run the code that the site's file names: its own, and what
            `allows.own_code` lets a server name.
        quiet: Whether to write no log to stderr.
        launcher: Folder of a launcher (see `prefork.py`) that sites share; None: its own.
        scratch: Folder for Flower's files; None: a temporary one.

    Returns:
        Whether a task may have been left unfinished.

    Raises:
        UserError: If the file or something it names is wrong, Flower is missing, or the server is
            not the one it should be.
        RunFailedError: If the server refuses this site.
    """
    site, folder = load_site_config(path, allow_code)
    if site.server is None:
        raise UserError(f"{path}: server: missing; expected address, authority and key")
    check_site_data(path, site)
    if site.server.authority is not None:
        check_authority(Path(site.server.authority))
    key = load_node_key(Path(site.server.key))
    check_installed()
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    log = EventLog(site.logs, client=site.client)
    log.quiet = quiet
    stop = threading.Event()
    interrupted = False
    with ExitStack() as stack:
        for line in stack.enter_context(lock_folder(folder)):
            log(line)
        stack.enter_context(handle_termination(log, stop))
        node = LoggedNode(Node(site, folder, log, key), log, stop, once)
        if scratch is None:
            temporary = tempfile.TemporaryDirectory(prefix="hetero_fl-node-")
            scratch = Path(stack.enter_context(temporary))
        address = scratch / "worker"
        worker = stack.enter_context(WorkerListener(address, node, log))
        supernode = stack.enter_context(SuperNode(site.server, address, scratch, log, launcher))
        log(f"{site.client}: looking for the server at {site.server.address}")
        try:
            while not stop.is_set():
                supernode.keep_running()
                worker.serve(POLL_SECONDS)
            time.sleep(DELIVERY_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
    log(f"{site.client}: stopped")
    if node.refused:
        raise RunFailedError(f"the server refuses this site: {node.refused}")
    return interrupted


def run_worker(path: Path, address: Path, parent: int, allow_code: bool = False) -> None:
    """Answer the messages that come over a site's socket until another process ends.

    Prints `listening` once it does, and its log to stderr.

    Args:
        path: The site's file.
        address: Path of the socket.
        parent: Number of the process with which this one ends.
        allow_code: Whether to run the code that the site's file names.

    Raises:
        UserError: If the site's file, or something that it names, is wrong.
    """
    site, folder = load_site_config(path, allow_code)
    check_site_data(path, site)
    key = None if site.server is None else load_node_key(Path(site.server.key))
    import torch._dynamo  # noqa: F401 optimizers load it at their first step

    log = EventLog(site.logs, client=site.client)
    with lock_folder(folder) as notes:
        for line in notes:
            log(line)
        node = LoggedNode(Node(site, folder, log, key), log)
        with WorkerListener(address, node, log) as worker:
            threading.Thread(target=_end_with, args=(parent, address), daemon=True).start()
            print(LISTENING, flush=True)
            os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
            while True:
                worker.serve(POLL_SECONDS)


def check_site_data(path: Path, site: SiteConfig) -> None:
    """Check a site's own data before a server counts on it.

    Raises:
        UserError: If it cannot be read; the message begins with the site's file.
    """
    if site.data is None:
        return
    try:
        check_source(site.data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class LoggedNode:
    """A node whose messages are logged.

    Args:
        node: The node.
        log: Receives a line for each task.
        stop: Set when the server refuses the node, and with `once` at the end of a run.
        once: Whether to take part in one run only.
    """

    def __init__(
        self, node: Node, log: EventLog, stop: threading.Event | None = None, once: bool = False
    ) -> None:
        self._node = node
        self._log = log
        self._stop = stop or threading.Event()
        self._once = once
        self.refused = ""

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message; see `Node.handle`."""
        began = time.monotonic()
        head = envelope.head
        answer = self._node.handle(envelope)
        if head.get("ask") == "do":
            self._log_task(envelope, answer, time.monotonic() - began)
        if head.get("ask") == "leave":
            self.refused = one_line(head.get("why", ""))
            if self.refused or self._once:
                self._stop.set()
        return answer

    def _log_task(self, request: Envelope, answer: Envelope, seconds: float) -> None:
        what = one_line(request.head.get("what"), 20)
        run = one_line(request.head.get("run", ""), 64)
        turn = request.head.get("round")
        # Models are read when a round is complete.
        number = turn + (what != "read") if isinstance(turn, int) else 0
        sizes = {"bytes_in": len(request.body), "bytes_out": len(answer.body)}
        line = f"round {number}: {what}: {answer.head.get('ask')!s} in {seconds:.2f} s"
        line += f", {sizes['bytes_in']:,} bytes came, {sizes['bytes_out']:,} went"
        self._log(line, run=run, round=number, task=what, seconds=float(f"{seconds:.3f}"), **sizes)


class WorkerListener:
    """Listens on a site's socket; use it as a context manager.

    Args:
        address: Path of the socket.
        node: Answers the messages, one at a time.
        log: Receives a line on each answer that could not be handed over.
    """

    def __init__(self, address: Path, node: LoggedNode, log: EventLog) -> None:
        self._address = address
        self._node = node
        self._log = log
        # One may be left of a process that was killed.
        address.unlink(missing_ok=True)
        self._listener = listen(address)

    def __enter__(self) -> WorkerListener:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._address.unlink(missing_ok=True)

    def serve(self, seconds: float) -> None:
        """Answer a message, if one comes within some seconds."""
        if not select.select([self._listener], [], [], seconds)[0]:
            return
        with Connection(self._listener.accept()[0].detach()) as connection:
            try:
                send(connection, self._node.handle(receive(connection)))
            except (EOFError, OSError) as error:
                self._log(f"an answer could not be handed to Flower ({error}); it is kept")


@contextmanager
def handle_termination(log: EventLog, stop: threading.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    asked = False

    def handle_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # This thread may hold the locks of the log and the event.
        threading.Thread(target=_stop_requested).start()

    def _stop_requested() -> None:
        log("stopping after the current task; repeat the signal to stop immediately")
        stop.set()

    before = signal.signal(signal.SIGTERM, handle_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _end_with(parent: int, address: Path) -> None:
    """End this process when its parent has ended. What it has answered is on disk."""
    while is_process_running(parent):
        time.sleep(PARENT_SECONDS)
    address.unlink(missing_ok=True)
    os._exit(0)


def main() -> int:
    """Run as a process; see `worker_socket.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("socket", type=Path)
    parser.add_argument("parent", type=int)
    parser.add_argument("--allow-code", action="store_true")
    arguments = parser.parse_args()
    try:
        run_worker(arguments.site, arguments.socket, arguments.parent, arguments.allow_code)
    except UserError as error:
        print(error, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
