"""Choice of the executor, workers, threads and device of a run.

The choice depends only on the architectures, the numbers of rows, rounds and cores, and the device,
so that it is the same whenever a run starts on a machine. A resumed run uses the choice of the
original run. See docs/explanation/limits.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.config.schema import Config, RuntimeConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.templates import (
    describe_model,
    example_flops,
    is_recurrent,
    training_flops,
)
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.processes import ProcessPool
from hetero_fl.federation.executors.torchrun import TorchrunPool, num_ranks
from hetero_fl.federation.executors.workers import PooledExecutor, WorkerPool, WorkerSetup
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.store import StateStore
from hetero_fl.federation.summed_uploads import make_protocol
from hetero_fl.utils.environment import (
    available_cores,
    choose_device,
    thread_limit,
    use_deterministic_algorithms,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.extras import check_extra
from hetero_fl.utils.text import pluralize

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"
# Assumed floating-point operations per second of one core, and duration of a training step of a
# model without parameters. Typical steps take a third to five times the estimate.
FLOPS_PER_SECOND = 1e10
STEP_SECONDS = 1e-4
# Approximate seconds until worker processes have started.
START_SECONDS = 4.5
# Bytes of parameters that are copied to a worker and back per second.
TRANSFER_RATE = 1e9
# Minimum number of floating-point operations per forward pass of a batch for more than one thread.
LARGE_STEP = 5e7
# Speedup by each worker and by each further thread, relative to training on one core.
WORKER_GAIN = 0.9
THREAD_GAIN = 0.5
# Maximum number of threads of a process. Typical models do not benefit from more.
MAX_THREADS = 4
# On a CPU, clients of one architecture are processed together if there are at least
# MIN_VECTORIZED_CLIENTS, the forward pass of a batch takes at most SMALL_STEP floating-point
# operations, and the model has at most SMALL_MODEL parameters.
MIN_VECTORIZED_CLIENTS = 8
SMALL_STEP = 2e7
SMALL_MODEL = 1_000_000
# Maximum number of clients processed together. Groups that do not fit into the memory of a device
# are halved (see `VectorizedBackend`).
MAX_CHUNK = 128
# Minimum number of chunks into which a group of clients is divided for workers.
MIN_CHUNKS = 8
# Executors that run clients in this process.
IN_PROCESS = ("serial", "batched")
# Executors to which each key of `runtime` applies.
EXECUTOR_KEYS = {
    "workers": ("processes", "ray"),
    "chunk": ("batched", "processes", "ray", "torchrun"),
    "address": ("ray",),
}


@contextmanager
def require_engine(config: RuntimeConfig, executor: str) -> Iterator[None]:
    """Check that an executor is available, and connect to a Ray cluster if the executor uses Ray.

    The connection is closed at the end of the context.

    Args:
        config: The runtime settings.
        executor: Name of the chosen executor.

    Raises:
        UserError: If the executor is not available or the cluster cannot be reached.
    """
    if executor == "torchrun" and num_ranks() == 1:
        raise UserError(
            "runtime.executor: torchrun requires at least two processes started by torchrun; "
            f"run {LAUNCH}"
        )
    if executor != "torchrun" and num_ranks() > 1:
        raise UserError(
            f"runtime.executor: must be torchrun, because torchrun started {num_ranks()} "
            f"processes, got '{config.executor}'"
        )
    if executor != "ray":
        yield
        return
    check_extra("ray", ["ray"], "runtime.executor")
    from hetero_fl.federation.executors.ray import connect

    workers = config.workers or available_cores()
    with connect(config.address, workers * (config.threads or thread_limit() or 1)):
        yield


def worker_count(
    executor: str, requested: int | None, threads: int, most: int, available: int
) -> tuple[int, str]:
    """Return the number of workers of an executor, and the reason for the number.

    With torchrun, all ranks except the first are workers, and all other arguments are ignored.

    Args:
        executor: Name of the executor.
        requested: Configured number of workers. If None, the number of cores is divided by
            `threads`.
        threads: Number of threads per worker.
        most: Maximum number of workers. Ignored if `requested` is given.
        available: Number of cores of this machine. Ignored for Ray, which uses the number of CPUs
            of the cluster.

    Raises:
        UserError: If a cluster has too few CPUs.
    """
    if executor == "torchrun":
        return num_ranks() - 1, "all ranks except the first"
    reason = "number of cores"
    if executor == "ray":
        from hetero_fl.federation.executors.ray import cluster_cpus

        available = cluster_cpus()
        reason = "number of CPUs of the cluster"
        if (requested or 1) * threads > available:
            raise UserError(
                f"runtime.workers: {requested or 1} with {threads} threads each exceed the "
                f"{available} CPUs of the cluster; reduce runtime.workers or runtime.threads"
            )
    if requested:
        return requested, "runtime.workers"
    return max(1, min(available // threads, most)), reason


@dataclass(frozen=True)
class ExecutorChoice:
    """Executor of a run, with the device and the settings.

    All attributes except `workers` and `reasons` can affect the rounding of the results. A resumed
    run therefore uses the attributes of the original run.

    Attributes:
        executor: "serial" or "batched" (clients run in this process), "processes", "ray" or
            "torchrun".
        device: Device on which clients train.
        threads: Number of threads of each process that trains clients.
        server_threads: Number of threads of the server's process.
        chunk: Number of clients of one architecture that are processed together.
        precision: "float32" or "bfloat16".
        deterministic: Whether to use deterministic algorithms.
        workers: Number of workers.
        reasons: Reasons for the choice, which are logged.
    """

    executor: str
    device: str
    threads: int
    server_threads: int
    chunk: int = 1
    precision: str = "float32"
    deterministic: bool = False
    workers: int = 1
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def record(self) -> dict[str, Any]:
        """Return the choice as a dictionary that can be serialized."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], config: RuntimeConfig) -> ExecutorChoice:
        """Create the choice of a resumed run.

        The number of workers is determined again, because the machine may have changed.

        Args:
            record: The return value of `record`.
            config: The runtime settings.

        Raises:
            UserError: If the device or the workers are not available.
        """
        choice = cls(**{**record, "reasons": tuple(record["reasons"])})
        choose_device(choice.device)
        if choice.executor in IN_PROCESS:
            return choice
        workers, _ = worker_count(
            choice.executor, config.workers, choice.threads, choice.workers, available_cores()
        )
        return replace(choice, workers=workers)


def training_seconds(client: ClientInfo) -> float:
    """Estimate how long a client's local training takes in one round on one core, in seconds."""
    flops = training_flops(client)
    num_steps = flops / (client.settings.batch_size * example_flops(client.arch))
    return flops / FLOPS_PER_SECOND + num_steps * STEP_SECONDS


@dataclass(frozen=True)
class RunLoad:
    """Estimated computational load of a run.

    Attributes:
        cohort: Number of clients in a round.
        seconds: Duration of local training in all rounds on one core, in seconds.
        model_bytes: Bytes of the parameters of all clients in all rounds.
        busy: Maximum average number of workers that run at the same time. The number is limited by
            the most expensive client, which is processed by a single worker.
        step: Floating-point operations per forward pass of a batch of the most expensive client.
    """

    cohort: int
    seconds: float
    model_bytes: float
    busy: float
    step: float

    @classmethod
    def estimate(cls, config: Config, federation: FederationSpec) -> RunLoad:
        """Estimate the load of a run from the representative clients."""
        clients = [federation.client_infos[c] for c in federation.representative_clients]
        population = len(federation.client_infos)
        cohort = min(population, config.clients.per_round or population)
        seconds = sum(map(training_seconds, clients)) / len(clients)
        parameters = sum(describe_model(c.arch).parameters for c in clients) / len(clients)
        largest = max(clients, key=training_seconds)
        return cls(
            cohort,
            seconds * cohort * config.rounds,
            4 * parameters * cohort * config.rounds,
            seconds * cohort / training_seconds(largest),
            largest.settings.batch_size * describe_model(largest.arch).forward_flops,
        )

    def thread_speedup(self, threads: int) -> float:
        """Return the assumed speedup of a process with several threads relative to one thread."""
        return 1 + THREAD_GAIN * (threads - 1) if self.step >= LARGE_STEP else 1.0

    def seconds_saved(self, available: int, threads: int | None) -> float:
        """Estimate how many seconds worker processes save, without the time until they start.

        The configured number of workers is ignored, so that it does not affect the results.

        Args:
            available: Number of cores of this machine.
            threads: Configured number of threads of each process. If None, a worker has one thread
                and a process without workers has up to `MAX_THREADS`.
        """
        without = self.seconds / self.thread_speedup(threads or min(MAX_THREADS, available))
        workers = min(max(1, available // (threads or 1)), self.busy)
        speedup = WORKER_GAIN * workers * self.thread_speedup(threads or 1)
        return without - self.seconds / speedup - self.model_bytes / TRANSFER_RATE


def choose_executor(config: Config, federation: FederationSpec) -> ExecutorChoice:
    """Choose the executor, the device and the runtime settings of a new run.

    Settings that are not configured are chosen automatically.

    Args:
        config: The configuration of the run.
        federation: The federation.

    Raises:
        UserError: If the device or the executor is not available, or if runtime settings
            contradict each other.
    """
    runtime = config.runtime
    device = choose_device(runtime.device)
    available = available_cores()
    load = RunLoad.estimate(config, federation)
    group = _num_worth_vectorizing(federation, load.cohort, device.type == "cpu")
    if runtime.executor == "serial" and (runtime.chunk or 1) > 1:
        raise UserError(
            f"runtime.chunk: must be 1 with runtime.executor=serial, got {runtime.chunk}; "
            "set runtime.executor=batched"
        )
    executor = runtime.executor
    executor_reason = "runtime.executor"
    if executor == "auto":
        executor, executor_reason = _select_executor(
            load, group, device, available, runtime.threads or thread_limit()
        )
    default_chunk = MAX_CHUNK if executor == "batched" else 1
    chunk = 1 if executor == "serial" else runtime.chunk or default_chunk
    together = 1
    if executor == "batched":
        members, _ = _vectorizable_group(federation, load.cohort, only_small=False)
        together = max(1, min(chunk, round(members)))
    threads, server_threads, thread_reason = _choose_threads(
        runtime, load, together, executor, available
    )
    reasons = [f"{executor} executor: {executor_reason}", thread_reason]
    workers = 1
    if executor not in IN_PROCESS:
        workers, worker_reason = worker_count(
            executor, runtime.workers, threads, load.cohort, available
        )
        reasons.append(f"{workers} workers: {worker_reason}")
    is_automatic = runtime.executor == "auto" and not runtime.chunk
    per_chunk = group // max(MIN_CHUNKS, available)
    if is_automatic and executor == "processes" and per_chunk >= MIN_VECTORIZED_CLIENTS:
        chunk = min(MAX_CHUNK, per_chunk)
        reasons.append(
            f"{chunk} clients at a time: small steps of {group} clients with one architecture"
        )
    for key, executors in EXECUTOR_KEYS.items():
        if getattr(runtime, key) is not None and executor not in executors:
            reasons.append(f"runtime.{key}: has no effect except with {', '.join(executors)}")
    return ExecutorChoice(
        executor,
        str(device),
        threads,
        server_threads,
        chunk,
        runtime.precision,
        runtime.deterministic,
        workers,
        tuple(reasons),
    )


def _select_executor(
    load: RunLoad, group: int, device: torch.device, available: int, threads: int | None
) -> tuple[str, str]:
    """Return the name of the fastest executor, and the reason for the choice.

    Args:
        load: Estimated load of the run.
        group: Number of clients that benefit from vectorization, or 0 if vectorization is not
            useful.
        device: Device on which clients train.
        available: Number of cores of this machine.
        threads: Configured number of threads of each process (see `RunLoad.seconds_saved`).
    """
    training = f"local training takes about {load.seconds:.1f} s on one core"
    saved = load.seconds_saved(available, threads) if device.type == "cpu" else 0.0
    if saved >= START_SECONDS:
        return "processes", f"{training}, and {available} cores save about {saved:.0f} s"
    if group:
        return "batched", f"small steps of {group} clients with one architecture"
    if device.type != "cpu":
        return "serial", "one device"
    if available == 1:
        return "serial", "one core"
    return "serial", f"{training}, and worker processes would not save the time of their start"


def _choose_threads(
    config: RuntimeConfig, load: RunLoad, group_size: int, executor: str, available: int
) -> tuple[int, int, str]:
    """Return the numbers of threads for clients and for the server, and the reason."""
    limit = thread_limit()
    if config.threads is not None:
        reason = f"{pluralize(config.threads, 'thread')} (runtime.threads)"
        return config.threads, config.threads, reason
    if limit is not None:
        return limit, limit, f"{pluralize(limit, 'thread')} (OMP_NUM_THREADS)"
    is_large = load.step * group_size >= LARGE_STEP
    server_threads = min(MAX_THREADS, available) if is_large else 1
    threads = server_threads if executor in IN_PROCESS else 1
    size = "large enough" if is_large else "too small"
    reason = (
        f"{pluralize(threads, 'thread')} for clients, {server_threads} for the server: training "
        f"steps are {size} for several threads"
    )
    return threads, server_threads, reason


def _vectorizable_group(
    federation: FederationSpec, cohort: int, only_small: bool
) -> tuple[float, float]:
    """Return the size of the largest group of clients that can be vectorized.

    Args:
        federation: The federation.
        cohort: Number of clients in a round.
        only_small: Whether to count only small models with small steps.

    Returns:
        The expected number of clients of a round with the most frequent suitable architecture, and
        the share of all clients that have any suitable architecture.
    """
    groups: Counter[ModelSpec] = Counter()
    for profile in federation.client_infos.profiles:
        model = describe_model(profile.arch)
        step = profile.settings.batch_size * model.forward_flops
        is_small = step <= SMALL_STEP and model.parameters <= SMALL_MODEL
        if not is_recurrent(profile.arch) and (is_small or not only_small):
            groups[profile.arch] += profile.count
    population = len(federation.client_infos)
    largest = max(groups.values(), default=0)
    return largest * cohort / population, groups.total() / population


def _num_worth_vectorizing(federation: FederationSpec, cohort: int, on_cpu: bool) -> int:
    """Return the expected number of clients of a round that benefit from vectorization.

    The result is 0 if the number is too small, or if at most half of all clients have a suitable
    architecture.
    """
    members, share = _vectorizable_group(federation, cohort, only_small=on_cpu)
    fewest = MIN_VECTORIZED_CLIENTS if on_cpu else 2
    return int(members) if members >= fewest and share > 0.5 else 0


def stays_on_device(algorithm: Algorithm, federation: FederationSpec) -> bool:
    """Return whether a run in one process may store all tensors of participants on the device.

    Compression, secure aggregation, privacy, attacks, robust aggregation rules and user-defined
    code work on the CPU.
    """
    links = FederationLinks(algorithm, federation)
    return (
        make_protocol(algorithm, federation).accepts_unencoded
        and links.up is None
        and links.down is None
        and federation.privacy is None
        and federation.malicious is None
        and federation.aggregation.is_plain_mean
        and not runs_user_code(algorithm, federation.client_infos)
    )


def make_executor(
    choice: ExecutorChoice,
    algorithm: Algorithm,
    federation: FederationSpec,
    store: StateStore | None = None,
    log: Callable[[str], None] = lambda _line: None,
) -> Executor:
    """Create the chosen executor, and configure PyTorch for the run.

    The number of threads of this process and the use of deterministic algorithms are set.

    Args:
        choice: The choice of the executor.
        algorithm: The method.
        federation: The federation.
        store: Store of the clients' private states. If None, a new store in memory is created.
        log: Function that is called with a message about each limitation of the backend, and when
            worker processes are replaced. By default, messages are ignored.
    """
    torch.set_num_threads(choice.server_threads)
    device = torch.device(choice.device)
    use_deterministic_algorithms(device, choice.deterministic)
    store = store or StateStore()
    memory = DeviceMemory(
        device,
        keeps_copies=not runs_user_code(algorithm, federation.client_infos),
        stores_tensors=choice.executor in IN_PROCESS and stays_on_device(algorithm, federation),
    )
    backend = make_backend(memory, choice.chunk, choice.precision, log)
    if choice.executor in IN_PROCESS:
        protocol = make_protocol(algorithm, federation)
        runtime = ClientRuntime(algorithm, federation, store, backend, protocol, local=True)
        return InProcessExecutor(runtime, choice.chunk)
    devices: tuple[str, ...] = (choice.device,)
    # Ray assigns devices itself.
    if choice.device == "cuda" and choice.executor != "ray":
        devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    setup = WorkerSetup(
        algorithm,
        federation,
        choice.threads,
        devices,
        choice.chunk,
        choice.precision,
        torch.get_default_dtype(),
        deterministic=choice.deterministic,
        owns_device=choice.executor != "ray" and choice.workers <= len(devices),
    )
    pool: WorkerPool
    if choice.executor == "ray":
        from hetero_fl.federation.executors.ray import RayActorPool

        pool = RayActorPool(setup, choice.workers)
    elif choice.executor == "torchrun":
        pool = TorchrunPool(setup)
    else:
        pool = ProcessPool(setup, choice.workers, log)
    return PooledExecutor(pool, federation.client_infos, store, backend, choice.chunk)
