"""What every process of a site does: check the site's data, answer messages, and log tasks."""

from __future__ import annotations

import time
from pathlib import Path

from hetero_fl.data import check_source
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.transport import Envelope
from hetero_fl.utils.errors import UserError, one_line


def check_site_data(path: Path, site: SiteConfig) -> None:
    """Check that a site's data can be loaded.

    Args:
        path: Path of the site file, for error messages.
        site: Configuration of the site.

    Raises:
        UserError: If the data cannot be loaded.
    """
    if site.data is None:
        return
    try:
        check_source(site.data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


class LoggedNode:
    """Wrapper around a node that logs each task.

    Args:
        node: Node that answers the messages.
        log: Log with a line for each task.
    """

    def __init__(self, node: Node, log: EventLog) -> None:
        self._node = node
        self._log = log

    def handle(self, envelope: Envelope) -> Envelope:
        """Answer a message (see `Node.handle`) and log the task if the message contains one."""
        start = time.monotonic()
        answer = self._node.handle(envelope)
        if envelope.head.get("ask") == "do":
            self._log_task(envelope, answer, time.monotonic() - start)
        return answer

    def _log_task(self, request: Envelope, answer: Envelope, seconds: float) -> None:
        what = one_line(request.head.get("what"), 20)
        run = one_line(request.head.get("run", ""), 64)
        round_idx = request.head.get("round")
        # An evaluation after a round has the index of the next round.
        number = round_idx + (what != "read") if isinstance(round_idx, int) else 0
        sizes = {"bytes_in": len(request.body), "bytes_out": len(answer.body)}
        line = f"round {number}: {what}: {answer.head.get('ask')!s} in {seconds:.2f} s"
        line += f", {sizes['bytes_in']:,} bytes received, {sizes['bytes_out']:,} bytes sent"
        self._log(line, run=run, round=number, task=what, seconds=float(f"{seconds:.3f}"), **sizes)
