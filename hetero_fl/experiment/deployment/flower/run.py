"""A run of Flower's that this process is the app of: nodes admitted, the run begun, its right to send messages held."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Iterable
from contextlib import suppress

import httpx
from flwr.common.constant import SubStatus
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from hetero_fl.errors import RunFailed
from hetero_fl.experiment.deployment.flower.calls import Over, Refused, Unreachable, calling
from hetero_fl.experiment.deployment.flower.superlink import Superlink

ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
BEAT = 10.0  # seconds between signs of life; Flower ends a run that gives none for a minute

# Flower wants an app to a run. Nobody ever installs or starts this one.
APP = """\
[project]
name = "hetero-fl"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "hetero-fl"

[tool.flwr.app.components]
serverapp = "none:app"
clientapp = "none:app"
"""


class Run:
    """From its making on until `close`, messages can be sent through `client` in the name of `number`."""

    def __init__(self, superlink: Superlink, keys: Iterable[tuple[str, bytes]]) -> None:
        url = f"{'http' if superlink.files is None else 'https'}://{superlink.address}"
        verify = superlink.verification()
        with calling(superlink.address), ControlHttpClient(url, verify=verify) as control:
            for name, key in keys:
                _admit(control, name, key)
            fab = Fab(content=_app())
            self.number: int = control.StartRun(StartRunRequest(fab=fab)).run_id
        guard = SuperExecAuthHttpInterceptor(master_secret=superlink.secret, protected_methods=[ACQUIRE])
        with calling(superlink.address), RuntimeHttpClient(url, verify=verify, interceptors=[guard]) as executor:
            got = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if not got.token or got.task.run_id != self.number:
            raise RunFailed("Flower's SuperLink has not given out the run that was begun")
        self.client = RuntimeHttpClient(url, verify=verify, interceptors=[RuntimeTokenHttpInterceptor(got.token)])
        with calling(superlink.address):
            self.client.PullTaskInput(PullTaskInputRequest())  # which says that it has begun
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(superlink.address,), daemon=True)
        self._beats.start()

    def close(self) -> None:
        """Say that it is over, if anybody still listens."""
        self._ended.set()
        self._beats.join()
        with suppress(httpx.HTTPError):
            self.client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
        self.client.close()

    def _beat(self, address: str) -> None:
        while not self._ended.wait(BEAT):
            with suppress(Unreachable, Refused, Over, RunFailed), calling(address):
                self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def _admit(control: ControlHttpClient, name: str, key: bytes) -> None:
    try:
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 409:  # it is admitted already
            raise


def _app() -> bytes:
    """The app as Flower packs one: a zip of files and a list of their hashes; the list is not asked for here."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("pyproject.toml", APP)
    return packed.getvalue()
