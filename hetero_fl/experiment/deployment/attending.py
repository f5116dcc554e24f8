"""A site's process: it waits for the server, answers it, and ends politely."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hetero_fl.data import check_source
from hetero_fl.errors import RunFailed, UserError, one_line
from hetero_fl.experiment.deployment.certificates import check_authority, load_node_key, load_public_key
from hetero_fl.experiment.deployment.identity import NodeKeys
from hetero_fl.experiment.deployment.log import Log, Told
from hetero_fl.experiment.deployment.node import Node
from hetero_fl.experiment.deployment.site_file import load_site
from hetero_fl.experiment.deployment.transport import Envelope
from hetero_fl.own_code import CodePermission
from hetero_fl.reporting.rundir import locked

NUMBER = "number"  # of this node at the transport; in the site's folder


def attend(path: Path, once: bool = False, allow_code: bool | CodePermission = False, quiet: bool = False) -> bool:
    """Answer the server that a site's file names until SIGTERM comes, and finish the task in hand; at once if it comes again, or
    Ctrl-C. Returns whether a task may have been left so.

    Args:
        path: The site's file.
        once: end when a run is over, too.
        allow_code: Whether code may run that the site's file names: its own, and what `allows.own_code` lets a server name.
        quiet: Write no log to stderr.

    Raises:
        UserError: what is wrong with the file or what it names; Flower is missing; the server is not who it should be.
        RunFailed: the server will not have this site.
    """
    site, folder = load_site(path, allow_code)
    if site.server is None:
        raise UserError(f"{path}: server: missing; it says whom this site answers (address, authority, key)")
    if site.data is not None:  # before a server counts on it
        try:
            check_source(site.data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    authority = None if site.server.authority is None else Path(site.server.authority)
    if authority is not None:
        check_authority(authority)
    import torch._dynamo  # noqa: F401 which optimisers load at their first step: better now than in a round

    from hetero_fl.experiment.deployment.flower import serve

    key = load_node_key(Path(site.server.key))
    log = Log(site.logs, client=site.client)
    log.quiet = quiet
    keys = None if site.server.public is None else NodeKeys(key, load_public_key(Path(site.server.public)))
    stop, hurried = threading.Event(), False
    with locked(folder) as unheld, _heard(log), _ending(log, stop):
        for line in unheld:
            log(line)
        attended = _Attended(Node(site, folder, log, keys, key), log, stop, once)
        log(f"{site.client}: looking for the server at {site.server.address}")
        try:
            serve(
                attended.handle, site.server.address, key, authority, folder / NUMBER, stop=stop,
                most=site.message_bytes,
            )  # fmt: skip
        except KeyboardInterrupt:
            hurried = True
    log(f"{site.client}: has said goodbye")
    if attended.refused:
        raise RunFailed(f"the server will not have this site: {attended.refused}")
    return hurried


class _Attended:
    """A node whose messages are logged, and which stops when there is no more to do."""

    def __init__(self, node: Node, log: Log, stop: threading.Event, once: bool) -> None:
        self._node, self._log, self._stop, self._once = node, log, stop, once
        self.refused = ""

    def handle(self, envelope: Envelope) -> Envelope:
        began, head = time.monotonic(), envelope.head
        answer = self._node.handle(envelope)
        if head.get("ask") == "do":
            self._log_task(envelope, answer, time.monotonic() - began)
        if head.get("ask") == "leave":
            self.refused = one_line(head.get("why", ""))
            if self.refused or self._once:
                self._stop.set()
        return answer

    def _log_task(self, asked: Envelope, answer: Envelope, seconds: float) -> None:
        what = one_line(asked.head.get("what"), 20)
        run = one_line(asked.head.get("run", ""), 64)
        turn = asked.head.get("round")
        # Models are read when a round is complete.
        number = turn + (what != "read") if isinstance(turn, int) else 0
        sizes = {"bytes_in": len(asked.body), "bytes_out": len(answer.body)}
        line = f"round {number}: {what}: {answer.head.get('ask')!s} in {seconds:.2f} s"
        line += f", {sizes['bytes_in']:,} bytes came, {sizes['bytes_out']:,} went"
        self._log(line, run=run, round=number, task=what, seconds=float(f"{seconds:.3f}"), **sizes)


@contextmanager
def _heard(log: Log) -> Iterator[None]:
    """What the transport has to say goes to the log, too."""
    logger, handler = logging.getLogger("hetero_fl.experiment.deployment"), Told(log)
    level, passed = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passed


@contextmanager
def _ending(log: Log, stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets the event; the second one is Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield
        return

    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        threading.Thread(target=_asked_to_stop).start()  # this thread may hold the locks of the log and the event

    def _asked_to_stop() -> None:
        log("stopping after the task in hand; once more: at once")
        stop.set()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
