"""Choice of the executor, workers, threads and device of a run.

The choice depends on the architectures, the numbers of rows, rounds and cores, and the device. If
these numbers do not determine whether worker processes save time, training steps are timed. A
resumed run uses the choice of the original run. See docs/explanation/limits.md.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.config.schema import Config, RuntimeConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.templates import (
    Templates,
    describe_model,
    example_flops,
    is_recurrent,
    training_flops,
)
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.pool import PooledExecutor, WorkerPool
from hetero_fl.federation.executors.processes import ProcessPool
from hetero_fl.federation.executors.torchrun import TorchrunPool, num_ranks
from hetero_fl.federation.executors.worker import WorkerSetup
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
from model_zoo.generators import keyed_generators
from model_zoo.shapes import make_shape

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"
# Assumed floating-point operations per second of one core, to convert estimates to seconds.
FLOPS_PER_SECOND = 2e10
# Seconds after which no further step is timed.
MEASURED_SECONDS = 0.1
# If the first step takes at least this number of seconds, no second step is timed.
SLOW_STEP = 0.5
# Approximate seconds until worker processes have started.
START_SECONDS = 4.5
# Estimates from the number of operations are wrong by up to this factor, in either direction.
ESTIMATE_FACTOR = 10
# Maximum number of architectures whose steps are timed, starting with the most expensive.
MAX_MEASURED = 4
# Parameters are copied to workers and back. Workers are used only if at most this number of bytes
# is copied per second of training.
MAX_TRAFFIC = 3e8
# Minimum number of floating-point operations per forward pass of a batch for more than one thread.
LARGE_STEP = 5e7
# Speedup by each worker, relative to training on one core without workers.
WORKER_GAIN = 0.9
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


@dataclass(frozen=True)
class RunLoad:
    """Estimated computational load of a run.

    Attributes:
        cohort: Number of clients in a round.
        seconds: Duration of local training in all rounds on one core, in seconds.
        model_bytes: Bytes of parameters per second of training.
        busy: Maximum average number of workers that run at the same time. The number is limited by
            the most expensive client, which is processed by a single worker.
        step: Floating-point operations per forward pass of a batch of the most expensive client.
        thread_speedup: Speedup of a process with several threads relative to one thread.
    """

    cohort: int
    seconds: float
    model_bytes: float
    busy: float
    step: float
    thread_speedup: float = 1.0

    @classmethod
    def estimate(cls, config: Config, federation: FederationSpec) -> RunLoad:
        """Estimate the load of a run from the representative clients, without measurements."""
        clients = [federation.client_infos[c] for c in federation.representative_clients]
        population = len(federation.client_infos)
        cohort = min(population, config.clients.per_round or population)
        # Per client and round.
        seconds = sum(map(training_flops, clients)) / len(clients) / FLOPS_PER_SECOND
        model_bytes = sum(4 * describe_model(c.arch).parameters for c in clients) / len(clients)
        largest = max(clients, key=training_flops)
        return cls(
            cohort,
            seconds * cohort * config.rounds,
            model_bytes / seconds,
            seconds * cohort / (training_flops(largest) / FLOPS_PER_SECOND),
            largest.settings.batch_size * describe_model(largest.arch).forward_flops,
        )

    def measure(self, federation: FederationSpec, threads: int) -> RunLoad:
        """Return the load, corrected by measured durations of training steps on this machine.

        At most `MAX_MEASURED` architectures are measured, starting with the most expensive one.

        Args:
            federation: The federation.
            threads: Number of threads with which steps are measured, in addition to one thread.
        """
        flops: dict[tuple[ModelSpec, int], float] = defaultdict(float)
        for client_id in federation.representative_clients:
            info = federation.client_infos[client_id]
            flops[info.arch, info.settings.batch_size] += training_flops(info)
        estimated = measured = with_threads = 0.0
        largest = sorted(flops.items(), key=lambda pair: -pair[1])[:MAX_MEASURED]
        for (arch, batch_size), total in largest:
            num_steps = total / (batch_size * example_flops(arch))
            seconds = measure_step(arch, batch_size, 1)
            estimated += total / FLOPS_PER_SECOND
            measured += num_steps * seconds
            if threads > 1:
                seconds = measure_step(arch, batch_size, threads)
            with_threads += num_steps * seconds
        factor = measured / estimated
        return replace(
            self,
            seconds=self.seconds * factor,
            model_bytes=self.model_bytes / factor,
            thread_speedup=measured / with_threads,
        )


def measure_step(arch: ModelSpec, batch_size: int, threads: int) -> float:
    """Measure the duration of a training step on the CPU.

    A step consists of a forward pass, a backward pass and an SGD update on examples of zeros.

    Args:
        arch: The architecture.
        batch_size: Number of examples per step.
        threads: Number of CPU threads.

    Returns:
        Duration in seconds. This is the minimum over several steps except the first step. For a
        slow model, only the first step is measured.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    templates = Templates(DeviceMemory(CPU))
    template = templates(arch)
    template.set_mode(training=True)
    _, channels, size, _ = arch.size_arguments
    x = make_shape(channels, size, arch.vocabulary).zeros(batch_size)
    optimizer = torch.optim.SGD(template.module.parameters(), lr=0.0, fused=True)
    seconds: list[float] = []
    try:
        with keyed_generators(0):
            while sum(seconds) < MEASURED_SECONDS or (len(seconds) == 1 and seconds[0] < SLOW_STEP):
                started = time.perf_counter()
                templates.dropout.seed([len(seconds)], batch_size)
                optimizer.zero_grad()
                template.module(x).logits.sum().backward()
                optimizer.step()
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads_before)
    return min(seconds[1:] or seconds)


def choose_executor(
    config: Config, federation: FederationSpec, measure: bool = True
) -> ExecutorChoice:
    """Choose the executor, the device and the runtime settings of a new run.

    Settings that are not configured are chosen automatically.

    Args:
        config: The configuration of the run.
        federation: The federation.
        measure: Whether training steps may be timed if the choice depends on the duration of a
            step.

    Raises:
        UserError: If the device or the executor is not available, or if runtime settings
            contradict each other.
    """
    runtime = config.runtime
    device = choose_device(runtime.device)
    available = available_cores()
    load = RunLoad.estimate(config, federation)
    group = _num_worth_vectorizing(federation, load.cohort, device)
    if runtime.executor == "serial" and (runtime.chunk or 1) > 1:
        raise UserError(
            f"runtime.chunk: must be 1 with runtime.executor=serial, got {runtime.chunk}; "
            "set runtime.executor=batched"
        )
    executor = runtime.executor
    executor_reason = "runtime.executor"
    if executor == "auto":
        threads_per_process = runtime.threads or thread_limit()
        if measure:
            load = _measure_if_undecided(load, federation, device, available, threads_per_process)
        executor, executor_reason = _select_executor(
            load, group, device, available, threads_per_process
        )
    default_chunk = MAX_CHUNK if executor == "batched" else 1
    chunk = 1 if executor == "serial" else runtime.chunk or default_chunk
    together = min(chunk, _largest_group(federation, load.cohort)) if executor == "batched" else 1
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
    if chunk > 1 and federation.data.is_streamed:
        reasons.append("data.stream: clients with images in files run one after the other")
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


def _measure_if_undecided(
    load: RunLoad,
    federation: FederationSpec,
    device: torch.device,
    available: int,
    threads_per_process: int | None,
) -> RunLoad:
    """Return the load. Training steps are timed if the choice depends on the duration of a step."""
    is_short = load.seconds * ESTIMATE_FACTOR < START_SECONDS
    if device.type != "cpu" or available == 1 or load.cohort == 1 or is_short:
        return load
    is_large = load.step >= LARGE_STEP
    threads = threads_per_process or (min(MAX_THREADS, available) if is_large else 1)
    return load.measure(federation, threads)


def _select_executor(
    load: RunLoad,
    group: int,
    device: torch.device,
    available: int,
    threads_per_process: int | None = None,
) -> tuple[str, str]:
    """Return the name of the fastest executor, and the reason for the choice.

    The configured number of workers is ignored, so that the number does not affect the results.

    Args:
        load: Estimated load of the run.
        group: Number of clients that benefit from vectorization, or 0 if vectorization is not
            useful.
        device: Device on which clients train.
        available: Number of cores of this machine.
        threads_per_process: Configured number of threads of each process. If None, one thread per
            process is assumed.
    """
    if device.type != "cpu" or available == 1 or load.cohort == 1:
        place = "core" if device.type == "cpu" else "device"
        serial_reason = f"one {place}, or one client at a time"
    else:
        serial_reason = _reason_against_workers(load, available, threads_per_process)
        if not serial_reason:
            return "processes", f"{_training_time(load)}, {available} cores available"
    if group:
        return "batched", f"small steps of {group} clients with one architecture"
    return "serial", serial_reason


def _reason_against_workers(load: RunLoad, available: int, threads_per_process: int | None) -> str:
    """Return why worker processes do not save time, or an empty string if they save time."""
    workers = min(max(1, available // (threads_per_process or 1)), load.busy)
    speedup_of_each = load.thread_speedup if threads_per_process else 1.0
    with_workers = load.seconds / (WORKER_GAIN * workers * speedup_of_each)
    saved = load.seconds / load.thread_speedup - with_workers
    if saved >= START_SECONDS:
        if load.model_bytes <= MAX_TRAFFIC:
            return ""
        rate = f"{load.model_bytes / 1e6:.0f} MB per second of training"
        return f"sending models to workers takes too long ({rate})"
    if with_workers < START_SECONDS:
        return f"{_training_time(load)}, too short to benefit from worker processes"
    return f"{_training_time(load)}, where threads are about as fast as worker processes"


def _training_time(load: RunLoad) -> str:
    time = f"about {load.seconds:.0f} s" if load.seconds >= 1 else "less than 1 s"
    return f"local training takes {time} on one core"


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


def _num_worth_vectorizing(federation: FederationSpec, cohort: int, device: torch.device) -> int:
    """Return the expected number of clients of a round that benefit from vectorization.

    Only clients with the most frequent suitable architecture are counted. The result is 0 if the
    number of these clients is too small, if at most half of all clients have a suitable
    architecture, or if the rows are read from files.
    """
    if federation.data.is_streamed:
        return 0
    groups: Counter[ModelSpec] = Counter()
    for profile in federation.client_infos.profiles:
        model = describe_model(profile.arch)
        step = profile.settings.batch_size * model.forward_flops
        is_small = step <= SMALL_STEP and model.parameters <= SMALL_MODEL
        if not is_recurrent(profile.arch) and (device.type != "cpu" or is_small):
            groups[profile.arch] += profile.count
    population = len(federation.client_infos)
    members = max(groups.values(), default=0) * (cohort / population)
    fewest = MIN_VECTORIZED_CLIENTS if device.type == "cpu" else 2
    return int(members) if members >= fewest and 2 * groups.total() > population else 0


def _largest_group(federation: FederationSpec, cohort: int) -> int:
    """Return the expected number of clients of a round that can be processed together (>= 1)."""
    groups: Counter[ModelSpec] = Counter()
    for profile in federation.client_infos.profiles:
        if not is_recurrent(profile.arch):
            groups[profile.arch] += profile.count
    return max(1, round(max(groups.values(), default=0) * cohort / len(federation.client_infos)))


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
