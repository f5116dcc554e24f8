"""A SuperNode whose worker answers as a test specifies."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hetero_fl.deployment.config import ServerConnectionConfig
from hetero_fl.deployment.flower.supernode import SuperNode
from hetero_fl.deployment.flower.worker import WorkerListener
from hetero_fl.deployment.monitoring import EventLog
from hetero_fl.deployment.transport import Handle


class EchoNode:
    """A SuperNode, and a worker in a thread; use it as a context manager.

    Args:
        address: Address of the server, `host:port`.
        handle: Answers the messages.
        authority: CA certificate that verifies the server's certificate.
        key: Private key of the node.
    """

    def __init__(
        self,
        address: str,
        handle: Handle,
        authority: Path | None = None,
        key: Path | None = None,
    ) -> None:
        server: dict[str, Any] = {"address": address}
        if authority is not None:
            server |= {"authority": str(authority), "key": str(key)}
        self._scratch = tempfile.TemporaryDirectory(prefix="hetero_fl-echo-")
        folder = Path(self._scratch.name)
        log = EventLog()
        log.quiet = True
        self._worker = WorkerListener(folder / "worker", SimpleNamespace(handle=handle), log)  # type: ignore[arg-type]
        self.supernode = SuperNode(ServerConnectionConfig(**server), folder / "worker", folder, log)
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> EchoNode:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.supernode.__exit__()
        self._worker.__exit__()
        self._scratch.cleanup()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.supernode.keep_running()
                self._worker.serve(0.1)
        except Exception as error:
            self.failure = error
