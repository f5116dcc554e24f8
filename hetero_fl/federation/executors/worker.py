"""Worker that runs the tasks of clients, in another process or at a site.

A worker receives the method and the federation once, and then jobs. A job contains everything that
its result depends on. The number of workers, the order of jobs and the failure of workers therefore
do not change the results.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import cloudpickle
import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.communication.protocol import Message, Reply
from hetero_fl.core.payload import PayloadError
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.driver import MAX_MESSAGE_LENGTH, DivergedError, translate_user_errors
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.client_runtime import ClientEvaluation, ClientRuntime
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.environment import use_deterministic_algorithms
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.recorded_warnings import RecordedWarning, record_warnings
from hetero_fl.utils.registry import pack_objects, unpack_objects
from model_zoo.generators import own_generators

# Exceptions that another process can unpickle.
_TRANSFERABLE_ERRORS = (UserError, RunFailedError, DivergedError, PayloadError)


@dataclass(frozen=True)
class WorkerSetup:
    """Setup that a worker receives once, at the start.

    Attributes:
        algorithm: The method.
        federation: The federation.
        threads: Number of threads of a worker.
        devices: Names of the devices, which are assigned to workers in turn.
        chunk: Number of clients of one architecture that are processed together.
        precision: "float32" or "bfloat16".
        dtype: Default dtype of PyTorch.
        shares_memory: Whether workers share memory with the process of the server.
        deterministic: Whether PyTorch uses deterministic algorithms.
        owns_device: Whether no two workers use the same device.
    """

    algorithm: Algorithm
    federation: FederationSpec
    threads: int
    devices: tuple[str, ...]
    chunk: int = 1
    precision: str = "float32"
    dtype: torch.dtype = torch.float32
    shares_memory: bool = False
    deterministic: bool = False
    owns_device: bool = False

    def __getstate__(self) -> dict[str, Any]:
        models = [
            [arch.name for arch in profile.models.values()]
            for profile in self.federation.client_infos.profiles
        ]
        settings = [
            profile.settings.model_dump() for profile in self.federation.client_infos.profiles
        ]
        objects = pack_objects(models, settings, self.federation.metrics)
        algorithm = cloudpickle.dumps(self.algorithm)
        return {**self.__dict__, "algorithm": algorithm, "objects": objects}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Objects are restored first, as the algorithm and the models refer to them.
        unpack_objects(state.pop("objects"))
        state["algorithm"] = cloudpickle.loads(state["algorithm"])
        self.__dict__.update(state)


@dataclass(frozen=True)
class WorkerJob:
    """Tasks of clients that are processed together.

    Attributes:
        kind: "answer" if requests are executed, "read" if models are evaluated.
        requests: Request to each client, keyed by client id.
        private: Encoded private states, keyed by client id. The value is None if the state is
            empty.
        details: Whether an evaluation computes all results that a report shows.
        notes: State of the clients between the exchanges of a round, keyed by client id (see
            `RoundProtocol.answer`).
    """

    kind: Literal["answer", "read"]
    requests: dict[str, Message]
    private: dict[str, bytes | None]
    details: bool = False
    notes: dict[str, bytes] = field(default_factory=dict)


@dataclass
class JobResult:
    """Result of a job.

    Attributes:
        replies: Reply of each client, keyed by client id.
        evaluations: Evaluation of each client, keyed by client id.
        private: Encoded private states that have changed, keyed by client id.
        notes: State of the clients between the exchanges of a round, keyed by client id.
        error: The exception with which the job failed, or None. An exception ends the run.
        trace: Traceback of the exception as text.
        warnings: Warnings that the job has issued.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    evaluations: dict[str, ClientEvaluation] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)
    notes: dict[str, bytes] = field(default_factory=dict)
    error: Exception | None = None
    trace: str = ""
    warnings: list[RecordedWarning] = field(default_factory=list)


class Worker:
    """Worker that runs jobs in a process.

    Args:
        setup: Setup of the workers.
        index: Index of the worker.
    """

    def __init__(self, setup: WorkerSetup, index: int) -> None:
        torch.set_num_threads(setup.threads)
        torch.set_default_dtype(setup.dtype)
        self.setup = setup
        self.index = index

    @cached_property
    def runtime(self) -> ClientRuntime:
        """Runtime that executes the plans of clients.

        The runtime is created by the first job, so that errors are part of the result of the job.
        """
        device = torch.device(self.setup.devices[self.index % len(self.setup.devices)])
        use_deterministic_algorithms(device, self.setup.deterministic)
        algorithm = self.setup.algorithm
        federation = self.setup.federation
        # Workers that share a device would each use half of the device's memory for copies.
        keeps_copies = self.setup.owns_device and not runs_user_code(
            algorithm, federation.client_infos
        )
        memory = DeviceMemory(device, keeps_copies)
        backend = make_backend(memory, self.setup.chunk, self.setup.precision)
        return ClientRuntime(
            algorithm,
            federation,
            StateStore(),
            backend,
            make_protocol(algorithm, federation),
            local=self.setup.shares_memory,
        )

    def run_job(self, job: WorkerJob) -> JobResult:
        """Run a job, and return the result. Exceptions are stored in the result and not raised."""
        result = JobResult()
        try:
            with own_generators(), record_warnings() as result.warnings:
                self._run_tasks(job, result)
        except Exception as error:
            result.error = _transferable_error(error)
            result.trace = traceback.format_exc()
        return result

    @translate_user_errors()
    def _run_tasks(self, job: WorkerJob, result: JobResult) -> None:
        # Without the states of earlier jobs.
        store = StateStore()
        self.runtime.store = store
        for client, private in job.private.items():
            store.stage(client, private or b"")
        store.commit()
        if job.kind == "read":
            contents = {client: request.content for client, request in job.requests.items()}
            round_idx = next(iter(job.requests.values())).round_idx
            result.evaluations = self.runtime.evaluate(contents, round_idx, job.details)
            return
        store.notes.update(job.notes)
        stamps = {client: store.committed.get(client) for client in job.requests}
        result.replies = self.runtime.run(job.requests)
        if not self.setup.shares_memory:
            # Replies travel to another machine.
            for client, reply in result.replies.items():
                if isinstance(reply, Message):
                    result.replies[client] = reply.with_checksum()
        result.notes = dict(store.notes)
        store.commit()
        for client, stamp in stamps.items():
            if store.committed.get(client) != stamp:
                result.private[client] = store.encoded(client) or b""


def _transferable_error(error: Exception) -> Exception:
    """Convert an exception to one that a process without the user's classes can unpickle."""
    if type(error) in _TRANSFERABLE_ERRORS:
        return error
    if isinstance(error, _TRANSFERABLE_ERRORS):
        return RunFailedError(str(error))
    message = " ".join(str(error).split())[:MAX_MESSAGE_LENGTH]
    return RunFailedError(f"a worker failed: {type(error).__name__}: {message}")


class RemoteTracebackError(Exception):
    """Cause of an exception in a worker, with the traceback of the worker's process as message."""
