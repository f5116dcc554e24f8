"""Choose how a run is computed: executor, workers, threads and device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import runs_user_code
from hetero_fl.config.schema import Config, RuntimeConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.participant import ClientInfo
from hetero_fl.engine.device_memory import CACHE_SHARE, DeviceMemory, MemoryPlan, free_bytes
from hetero_fl.engine.templates import (
    RATE,
    describe_model,
    example_flops,
    is_recurrent,
    measure_step,
    training_flops,
)
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.processes import ProcessPool
from hetero_fl.federation.executors.torchrun import TorchrunPool, num_ranks
from hetero_fl.federation.executors.workers import WorkerExecutor, WorkerPool, WorkerSetup
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.secure_aggregation import make_protocol
from hetero_fl.federation.state_store import StateStore
from hetero_fl.utils.environment import (
    available_cores,
    choose_device,
    thread_limit,
    use_deterministic_algorithms,
)
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"

# The rule looks at architectures, group sizes, rows, rounds, cores and the device. Where these
# leave open whether workers pay, steps are timed. The choice is recorded: a run that is resumed
# keeps it. docs/scaling.md states the rule for users.

START_SECONDS = 4.5  # until worker processes have started, about
# Estimates from operations alone are wrong by up to this factor, in either direction.
ESTIMATE_FACTOR = 10
MOST_MEASURED = 4  # architectures whose steps are timed: those with most of the training
# Parameters are copied to workers and back: bytes per second of training up to which they pay.
MAX_TRAFFIC = 3e8
# Floating-point operations of a forward step from which a second thread helps
# (benchmarks/speed/threads.py).
LARGE_STEP = 5e7
WORKER_GAIN = 0.9  # share of a core's time that one more worker gains
MAX_THREADS = 4  # of one process: models of this size gain nothing from more
# On a CPU, clients of one architecture are computed together if there are at least so many, ...
MIN_VECTORIZED_CLIENTS = 8
SMALL_STEP = 2e7  # ... a forward step takes at most so many floating-point operations ...
SMALL_MODEL = 1_000_000  # ... and the model has at most so many parameters.
MAX_CHUNK = 128  # clients computed together, which bounds memory
MIN_CHUNKS = 8  # that a group is divided into for workers, or one per core
IN_PROCESS = ("serial", "batched")
EXECUTOR_KEYS = {
    "workers": ("processes", "ray"),
    "chunk": ("batched", "processes", "ray", "torchrun"),
    "address": ("ray",),
}


@contextmanager
def require_engine(config: RuntimeConfig, executor: str) -> Iterator[None]:
    """Provide what an executor needs around a run: a launch by torchrun, or a cluster.

    Raises:
        UserError: If it is not available.
    """
    if executor == "torchrun" and num_ranks() == 1:
        raise UserError(
            f"runtime.executor: torchrun needs two processes or more, launched by it: {LAUNCH}"
        )
    if executor != "torchrun" and num_ranks() > 1:
        raise UserError(
            f"runtime.executor: found '{config.executor}', but torchrun started {num_ranks()} processes; "
            "write runtime.executor=torchrun"
        )
    if executor != "ray":
        yield
        return
    if find_spec("ray") is None:
        raise UserError("runtime.executor: ray is not installed: pip install 'hetero_fl[ray]'")
    from hetero_fl.federation.executors.ray import connect

    workers = config.workers or available_cores()
    with connect(config.address, workers * (config.threads or thread_limit() or 1)):
        yield


def worker_count(
    executor: str, requested: int | None, threads: int, most: int, available: int
) -> tuple[int, str]:
    """Return the number of workers of an executor, and why.

    Args:
        executor: The executor's name.
        requested: The configured number.
        threads: Threads per worker.
        most: Upper bound, unless a number is configured.
        available: Cores of this machine.

    Raises:
        UserError: If a cluster has no room for them.
    """
    if executor == "torchrun":
        return num_ranks() - 1, "ranks but the first"
    reason = "cores"
    if executor == "ray":
        from hetero_fl.federation.executors.ray import cluster_cpus

        available = cluster_cpus()
        reason = "CPUs of the cluster"
        if (requested or 1) * threads > available:
            raise UserError(
                f"runtime.workers: found {requested or 1} of {threads} threads, but the cluster has {available} CPUs; "
                "take fewer, or fewer runtime.threads"
            )
    if requested:
        return requested, "runtime.workers"
    return max(1, min(available // threads, most)), reason


@dataclass(frozen=True)
class ExecutorChoice:
    """How a run is computed. All but `workers` decides its bits, and is kept when it is resumed."""

    executor: str  # serial, batched; or whose workers: processes, ray, torchrun
    device: str
    threads: int  # of every process that computes clients
    server_threads: int  # of the process that computes the server
    chunk: int = 1  # clients of one architecture that are computed together
    precision: str = "float32"
    deterministic: bool = False
    workers: int = 1
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def record(self) -> dict[str, Any]:
        """Return the choice as it is stored with results and in checkpoints."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], config: RuntimeConfig) -> ExecutorChoice:
        """Restore the choice that a run began with; the number of workers may change.

        Raises:
            UserError: If its device or workers are not available.
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
    """Estimates of a run's training."""

    cohort: int  # clients in a round
    seconds: float  # of all rounds, on one core
    model_bytes: float  # of parameters, per second of training
    busy: float  # workers that would be busy: the most expensive client keeps one to itself
    step: float  # floating-point operations of a forward step of the most expensive client
    thread_speedup: float = 1.0  # of a process with the threads that it would have

    @classmethod
    def estimate(cls, config: Config, federation: FederationSpec) -> RunLoad:
        """Estimate the load from the clients that are evaluated, which represent the others."""
        clients = [federation.client_infos[id] for id in federation.representative_clients]
        population = len(federation.client_infos)
        cohort = min(population, config.clients.per_round or population)
        seconds = sum(map(training_flops, clients)) / len(clients) / RATE  # per client and round
        model_bytes = sum(4 * describe_model(c.arch).parameters for c in clients) / len(clients)
        largest = max(clients, key=training_flops)
        return cls(
            cohort,
            seconds * cohort * config.rounds,
            model_bytes / seconds,
            seconds * cohort / (training_flops(largest) / RATE),
            largest.settings.batch_size * describe_model(largest.arch).forward_flops,
        )

    def measure(self, federation: FederationSpec, threads: int) -> RunLoad:
        """Return the load with the seconds that steps take on this machine.

        Args:
            federation: The clients; the steps of those with most of the training are timed.
            threads: Threads of a process that computes all clients.
        """
        flops: dict[tuple[ModelSpec, int], float] = defaultdict(float)
        for client_id in federation.representative_clients:
            info = federation.client_infos[client_id]
            flops[info.arch, info.settings.batch_size] += training_flops(info)
        estimated = measured = with_threads = 0.0
        largest = sorted(flops.items(), key=lambda pair: -pair[1])[:MOST_MEASURED]
        for (arch, batch_size), total in largest:
            num_steps = total / (batch_size * example_flops(arch))
            seconds = measure_step(arch, batch_size, 1)
            estimated += total / RATE
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


def choose_executor(
    config: Config, federation: FederationSpec, measure: bool = True
) -> ExecutorChoice:
    """Choose how a new run is computed: as configured, else by a rule.

    Args:
        config: The run's configuration.
        federation: Its clients.
        measure: Whether steps may be timed where the rule depends on it.

    Raises:
        UserError: If the device is not available.
    """
    runtime = config.runtime
    device = choose_device(runtime.device)
    available = available_cores()
    load = RunLoad.estimate(config, federation)
    group = _num_worth_vectorizing(federation, load.cohort, device)
    if runtime.executor == "serial" and (runtime.chunk or 1) > 1:
        raise UserError(
            f"runtime.chunk: found {runtime.chunk}, but the serial executor takes one client at a time; use batched"
        )
    executor = runtime.executor
    why = "runtime.executor"
    if executor == "auto":
        own_threads = runtime.threads or thread_limit()
        if measure:
            load = _measure_if_open(load, federation, device, available, own_threads)
        executor, why = _select_executor(load, group, device, available, own_threads)
    chunk = runtime.chunk or (MAX_CHUNK if executor == "batched" else 1)
    if executor == "serial":
        chunk = 1
    room = ""
    if executor == "batched" and runtime.chunk is None and device.type == "cuda":
        chunk, room = _chunk_for_device(federation, device)
    together = min(chunk, _largest_group(federation, load.cohort)) if executor == "batched" else 1
    threads, server_threads, size = _choose_threads(runtime, load, together, executor, available)
    reasons = [f"{executor} executor: {why}", size]
    if room:
        reasons.append(room)
    workers = 1
    if executor not in IN_PROCESS:
        workers, why = worker_count(executor, runtime.workers, threads, load.cohort, available)
        reasons.append(f"{workers} workers: {why}")
    is_automatic = runtime.executor == "auto" and not runtime.chunk
    per_chunk = group // max(MIN_CHUNKS, available)
    if is_automatic and executor == "processes" and per_chunk >= MIN_VECTORIZED_CLIENTS:
        chunk = min(MAX_CHUNK, per_chunk)
        reasons.append(
            f"{chunk} clients at a time: small steps of {group} clients with one architecture"
        )
    for key, users in EXECUTOR_KEYS.items():
        if getattr(runtime, key) is not None and executor not in users:
            reasons.append(f"runtime.{key} has no effect: it is for {', '.join(users)}")
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


def _measure_if_open(
    load: RunLoad,
    federation: FederationSpec,
    device: torch.device,
    available: int,
    own_threads: int | None,
) -> RunLoad:
    """Return the load, measured if it decides whether workers pay."""
    short = load.seconds * ESTIMATE_FACTOR < START_SECONDS
    if device.type != "cpu" or available == 1 or load.cohort == 1 or short:
        return load
    is_large = load.step >= LARGE_STEP
    threads = own_threads or (min(MAX_THREADS, available) if is_large else 1)
    return load.measure(federation, threads)


def _select_executor(
    load: RunLoad,
    group: int,
    device: torch.device,
    available: int,
    threads_per_process: int | None = None,
) -> tuple[str, str]:
    """Return the executor's name, and why it is used.

    A configured number of workers is ignored, as it changes no result.

    Args:
        load: The run's training.
        group: Clients that are worth computing together.
        device: Where clients are computed.
        available: Cores of this machine.
        threads_per_process: Threads of a process whatever it computes, if they are configured.
    """
    vectorized = "batched", f"small steps of {group} clients with one architecture"
    if device.type != "cpu" or available == 1 or load.cohort == 1:
        if group:
            return vectorized
        place = "core" if device.type == "cpu" else "device"
        return "serial", f"one {place}, or one client at a time"
    workers = min(max(1, available // (threads_per_process or 1)), load.busy)
    speedup_of_each = load.thread_speedup if threads_per_process else 1.0
    with_workers = load.seconds / (WORKER_GAIN * workers * speedup_of_each)
    saved = load.seconds / load.thread_speedup - with_workers
    about = f"about {load.seconds:.0f} s of training for one core"
    if saved >= START_SECONDS and load.model_bytes <= MAX_TRAFFIC:
        return "processes", f"{about}, {available} cores"
    if group:
        return vectorized
    if saved >= START_SECONDS:
        rate = f"{load.model_bytes / 1e6:.0f} MB a second"
        return "serial", f"models too large for so little training ({rate}) to travel to workers"
    if with_workers < START_SECONDS:
        return "serial", f"{about}, too little for worker processes to pay"
    return "serial", f"{about}, which threads compute about as fast as workers would"


def _choose_threads(
    config: RuntimeConfig, load: RunLoad, group_size: int, executor: str, available: int
) -> tuple[int, int, str]:
    """Return the threads of a process that computes clients, those of the server's, and why."""
    limit = thread_limit()
    if config.threads is not None:
        why = f"{pluralize(config.threads, 'thread')}: runtime.threads"
        return config.threads, config.threads, why
    if limit is not None:
        return limit, limit, f"{pluralize(limit, 'thread')}: OMP_NUM_THREADS"
    is_large = load.step * group_size >= LARGE_STEP
    server_threads = min(MAX_THREADS, available) if is_large else 1
    threads = server_threads if executor in IN_PROCESS else 1
    size = "large enough" if is_large else "too small"
    why = (
        f"{pluralize(threads, 'thread')} where clients are computed, {server_threads} at the "
        f"server: steps are {size} for more than one"
    )
    return threads, server_threads, why


def _num_worth_vectorizing(federation: FederationSpec, cohort: int, device: torch.device) -> int:
    """Return how many clients of a round share an architecture, 0 if vectorizing does not pay.

    It pays if it does so for most of the cohort.
    """
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


def plan_memory(client_info: ClientInfo) -> MemoryPlan:
    """Estimate the memory of a client's local training."""
    settings = client_info.settings
    return MemoryPlan.estimate(client_info.models, settings.optimizer, settings.batch_size)


def _chunk_for_device(federation: FederationSpec, device: torch.device) -> tuple[int, str]:
    """Return how many clients are computed together on a device, and why."""
    client_infos = federation.client_infos
    largest = max(plan_memory(client_infos[p.first]).total for p in client_infos.profiles)
    # The rest is for copies of what the host holds.
    free = (1 - CACHE_SHARE) * free_bytes(device)
    chunk = min(MAX_CHUNK, max(1, int(free // largest)))
    return chunk, (
        f"{pluralize(chunk, 'client')} at a time: a client takes up to {largest / 1e6:,.0f} MB, "
        f"and {free / 1e6:,.0f} MB of {device} are for them"
    )


def _largest_group(federation: FederationSpec, cohort: int) -> int:
    """Return about how many clients of a round can be computed together, at least 1."""
    groups: Counter[ModelSpec] = Counter()
    for profile in federation.client_infos.profiles:
        if not is_recurrent(profile.arch):
            groups[profile.arch] += profile.count
    return max(1, round(max(groups.values(), default=0) * cohort / len(federation.client_infos)))


def stays_on_device(algorithm: Algorithm, federation: FederationSpec) -> bool:
    """Return whether a run in one process may hold everything on its device.

    It does where only the engine, the methods of this package and the plain mean read what
    participants hold. Compression, secure sums, privacy, attacks and robust rules work on the CPU,
    and so does a user's code.
    """
    links = FederationLinks(algorithm, federation)
    return (
        make_protocol(algorithm, federation).takes_payload
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
    say: Callable[[str], None] = lambda line: None,
) -> Executor:
    """Create the executor of a choice, and set this process's threads to the server's.

    Args:
        choice: How the run is computed.
        algorithm: The method.
        federation: Its clients and data.
        store: Their private state; by default a new one in memory.
        say: Receives a line on what cannot be computed as chosen.
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
    backend = make_backend(memory, choice.chunk, choice.precision, say)
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
        from hetero_fl.federation.executors.ray import RayActorPool  # an extra

        pool = RayActorPool(setup, choice.workers)
    elif choice.executor == "torchrun":
        pool = TorchrunPool(setup)
    else:
        pool = ProcessPool(setup, choice.workers)
    return WorkerExecutor(pool, federation.client_infos, store, backend, choice.chunk)
