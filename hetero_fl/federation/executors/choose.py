"""Choose executor, workers, threads and device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from hetero_fl.algorithms import Algorithm
from hetero_fl.config.schema import Config, RuntimeConfig
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.engine.templates import RATE, describe_model, is_recurrent, training_flops
from hetero_fl.engine.vectorized import make_backend
from hetero_fl.federation.channel import make_protocol
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import Executor, InProcessExecutor
from hetero_fl.federation.executors.processes import ProcessPool
from hetero_fl.federation.executors.torchrun import TorchrunPool, num_ranks
from hetero_fl.federation.executors.workers import WorkerExecutor, WorkerPool, WorkerSetup
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.state_store import StateStore
from hetero_fl.utils.environment import available_cores, choose_device, thread_limit
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import pluralize

# What some executors need around a run, before anything is written: a cluster to compute on, a
# launch by torchrun.

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"


@contextmanager
def require_engine(config: RuntimeConfig, executor: str) -> Iterator[None]:
    """Have what the executor needs. Raises UserError, in one line that helps, if it is not to be had."""
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

    with connect(
        config.address,
        (config.workers or available_cores()) * (config.threads or thread_limit() or 1),
    ):
        yield


def worker_count(
    executor: str, requested: int | None, threads: int, most: int, available: int
) -> tuple[int, str]:
    """How many workers of so many threads an executor gets on so many cores, and why; not more than `most` unless asked.

    Raises UserError if a cluster has no room for them.
    """
    if executor == "torchrun":
        return num_ranks() - 1, "ranks but the first"
    if executor != "ray":
        return requested or max(
            1, min(available // threads, most)
        ), "runtime.workers" if requested else "cores"
    from hetero_fl.federation.executors.ray import cluster_cpus

    if (requested or 1) * threads > cluster_cpus():
        raise UserError(
            f"runtime.workers: found {requested or 1} of {threads} threads, but the cluster has {cluster_cpus()} CPUs; "
            "take fewer, or fewer runtime.threads"
        )
    return requested or max(
        1, min(cluster_cpus() // threads, most)
    ), "runtime.workers" if requested else "CPUs of the cluster"


# How a run is computed: executor, workers, threads, device; as configured, else by a rule from what
# is known beforehand.
#
# The rule looks at architectures, group sizes, rows, rounds, cores and the device, never at the
# clock: the same machine makes the same choice, and the same choice gives the same bits.
# docs/scaling.md states it for users.

START = 4.5  # seconds, about, until worker processes have started
# bytes of parameters for a second of training up to which workers pay: they are copied there and
# back
TRAFFIC = 3e8
# floating-point operations of a step forward from which a second thread helps
# (benchmarks/speed/threads.py)
LARGE_STEP = 5e7
# of a core's time that one more worker, and one more thread in large steps, gains
WORKER = 0.9
THREAD = 0.5
# clients of one architecture from which computing them together may pay on a CPU
MIN_VECTORIZED_CLIENTS = 8
SMALL_STEP = 2e7  # floating-point operations of a step forward up to which it does
SMALL_MODEL = 1_000_000  # parameters up to which it does
IN_PROCESS = ("serial", "batched")
CHUNK = 128  # clients computed together at most: bounds memory
# chunks, or one a core, that a group is cut into for workers, if they are then of TOGETHER clients
# or more
PIECES = 8
EXECUTOR_KEYS = {
    "workers": ("processes", "ray"),
    "chunk": ("batched", "processes", "ray", "torchrun"),
    "address": ("ray",),
}
MOST_THREADS = 4  # of one process: models of this size gain nothing from more


@dataclass(frozen=True)
class ExecutorChoice:
    """How a run is computed. All but `workers` decides its bits, and is kept when it is resumed."""

    executor: str  # serial, batched; or whose workers: processes, ray, torchrun
    device: str
    threads: int  # of every process that computes clients
    server_threads: int  # of the process that computes the server
    chunk: int = 1  # clients of one architecture that are computed together
    precision: str = "float32"
    workers: int = 1
    reasons: tuple[str, ...] = field(default=(), compare=False)

    def record(self) -> dict[str, Any]:
        """As kept beside results and in checkpoints."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], config: RuntimeConfig) -> ExecutorChoice:
        """The choice that a run began with; the number of workers may be another when it goes on."""
        choice = cls(**{**record, "reasons": tuple(record["reasons"])})
        choose_device(choice.device)  # it has to be here, too
        if choice.executor in IN_PROCESS:
            return choice
        workers, _ = worker_count(
            choice.executor, config.workers, choice.threads, choice.workers, available_cores()
        )
        return replace(choice, workers=workers)


@dataclass(frozen=True)
class RunLoad:
    """A run's training, estimated."""

    cohort: int  # clients in a round
    seconds: float  # of all rounds, for one core
    traffic: float  # bytes of parameters for each of these seconds
    busy: float  # workers that would be busy: the costliest client keeps one to itself
    step: float  # floating-point operations forward, of a step of the costliest client

    @classmethod
    def estimate(cls, config: Config, federation: FederationSpec) -> RunLoad:
        """Of a large population, what is known of some of its clients stands for all."""
        some = [federation.client_infos[id] for id in federation.num_evaluated]
        cohort = min(
            len(federation.client_infos), config.clients.per_round or len(federation.client_infos)
        )
        each = sum(map(training_flops, some)) / len(some) / RATE
        costliest = max(some, key=training_flops)
        return cls(
            cohort,
            each * cohort * config.rounds,
            sum(4 * describe_model(card.arch).parameters for card in some) / len(some) / each,
            each * cohort / (training_flops(costliest) / RATE),
            costliest.settings.batch_size * describe_model(costliest.arch).forward_flops,
        )


def choose_executor(config: Config, federation: FederationSpec) -> ExecutorChoice:
    """The choice for a run that begins. Raises UserError if the device is not here."""
    asked = config.runtime
    device = choose_device(config.runtime.device)
    available = available_cores()
    load = RunLoad.estimate(config, federation)
    group = _worth_batching(federation, load.cohort, device)
    if asked.executor == "serial" and (asked.chunk or 1) > 1:
        raise UserError(
            f"runtime.chunk: found {asked.chunk}, but the serial executor takes one client at a time; use batched"
        )
    executor = asked.executor
    why = "runtime.executor"
    if executor == "auto":
        executor, why = _select_executor(
            load, group, device, available, asked.threads or thread_limit()
        )
    chunk = asked.chunk or (CHUNK if executor == "batched" else 1)
    together = min(chunk, _largest_group(federation, load.cohort)) if executor == "batched" else 1
    threads, server_threads, size = _threads(asked, load, together, executor, available)
    reasons = [f"{executor} executor: {why}", size]
    workers = 1
    if executor not in IN_PROCESS:
        workers, why = worker_count(executor, asked.workers, threads, load.cohort, available)
        reasons.append(f"{workers} workers: {why}")
    pieces = max(PIECES, available)
    if (
        asked.executor == "auto"
        and executor == "processes"
        and not asked.chunk
        and group // pieces >= MIN_VECTORIZED_CLIENTS
    ):
        chunk = min(CHUNK, group // pieces)
        reasons.append(
            f"{chunk} clients at a time: small steps of {group} clients with one architecture"
        )
    if executor == "serial":
        chunk = 1
    for key, users in EXECUTOR_KEYS.items():
        if getattr(asked, key) is not None and executor not in users:
            reasons.append(f"runtime.{key} has no effect: it is for {', '.join(users)}")
    return ExecutorChoice(
        executor,
        str(device),
        threads,
        server_threads,
        chunk,
        asked.precision,
        workers,
        tuple(reasons),
    )


def _select_executor(
    load: RunLoad,
    group: int,
    device: torch.device,
    available: int,
    threads_per_process: int | None = None,
) -> tuple[str, str]:
    """Which, and why; `threads_per_process`: the threads that a process gets whatever it computes. (Workers that are asked for do not count:
    their number changes no result.)"""
    if device.type != "cpu" or available == 1 or load.cohort == 1:
        if group:
            return "batched", f"small steps of {group} clients with one architecture"
        return (
            "serial",
            f"one {'core' if device.type == 'cpu' else 'device'}, or one client at a time",
        )

    def speed(threads: int) -> float:
        return 1 + THREAD * (min(threads, available) - 1) if load.step >= LARGE_STEP else 1.0

    workers = (
        WORKER
        * min(max(1, available // (threads_per_process or 1)), load.busy)
        * speed(threads_per_process or 1)
    )
    saved = load.seconds / speed(threads_per_process or MOST_THREADS) - load.seconds / workers
    about = f"about {load.seconds:.0f} s of training for one core"
    if saved >= START and load.traffic <= TRAFFIC:
        return "processes", f"{about}, {available} cores"
    if group:
        return "batched", f"small steps of {group} clients with one architecture"
    if saved >= START:
        rate = f"{load.traffic / 1e6:.0f} MB a second"
        return "serial", f"models too large for so little training ({rate}) to travel to workers"
    return "serial", f"{about}, of which workers would save no more than their start takes"


def _threads(
    config: RuntimeConfig, load: RunLoad, group_size: int, executor: str, available: int
) -> tuple[int, int, str]:
    """Of a process that computes clients, and of the server's; and why."""
    limit = thread_limit()
    if config.threads is not None:
        return (
            config.threads,
            config.threads,
            f"{pluralize(config.threads, 'thread')}: runtime.threads",
        )
    if limit is not None:
        return limit, limit, f"{pluralize(limit, 'thread')}: OMP_NUM_THREADS"
    large = load.step * group_size >= LARGE_STEP
    at_server = min(MOST_THREADS, available) if large else 1
    threads = at_server if executor in IN_PROCESS else 1
    size = f"steps are {'large enough' if large else 'too small'} for more than one"
    return (
        threads,
        at_server,
        f"{pluralize(threads, 'thread')} where clients are computed, {at_server} at the server: {size}",
    )


def _worth_batching(federation: FederationSpec, cohort: int, device: torch.device) -> int:
    """How many clients of a round share an architecture, if computing them together pays for most of the cohort; else 0."""
    groups: dict[ModelSpec, int] = {}
    for kind in federation.client_infos.profiles:
        about = describe_model(kind.arch)
        steps = kind.settings.batch_size * about.forward_flops
        if is_recurrent(kind.arch):
            continue
        if device.type != "cpu" or (steps <= SMALL_STEP and about.parameters <= SMALL_MODEL):
            groups[kind.arch] = groups.get(kind.arch, 0) + kind.count
    share = cohort / len(federation.client_infos)
    members = max((n * share for n in groups.values()), default=0.0)
    most = 2 * sum(groups.values()) > len(federation.client_infos)
    return (
        int(members)
        if most and members >= (MIN_VECTORIZED_CLIENTS if device.type == "cpu" else 2)
        else 0
    )


def _largest_group(federation: FederationSpec, cohort: int) -> int:
    """How many clients of a round can be computed together, about; 1 or more."""
    groups = Counter[ModelSpec]()
    for kind in federation.client_infos.profiles:
        if not is_recurrent(kind.arch):
            groups[kind.arch] += kind.count
    return max(1, round(max(groups.values(), default=0) * cohort / len(federation.client_infos)))


def make_executor(
    choice: ExecutorChoice,
    algorithm: Algorithm,
    federation: FederationSpec,
    store: StateStore | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Executor:
    """The executor of a choice; `say` is told of what it cannot do as chosen. Sets this process's threads to the server's."""
    torch.set_num_threads(choice.server_threads)
    store = store or StateStore()
    backend = make_backend(torch.device(choice.device), choice.chunk, choice.precision, say)
    if choice.executor in IN_PROCESS:
        return InProcessExecutor(
            ClientRuntime(
                algorithm, federation, store, backend, make_protocol(algorithm, federation)
            ),
            choice.chunk,
        )
    devices: tuple[str, ...] = (choice.device,)
    # spread over all of them; Ray deals them out itself
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
    )
    return WorkerExecutor(
        _make_worker_pool(choice, setup), federation.client_infos, store, backend, choice.chunk
    )


def _make_worker_pool(choice: ExecutorChoice, setup: WorkerSetup) -> WorkerPool:
    if choice.executor == "ray":
        from hetero_fl.federation.executors.ray import RayActorPool  # an extra

        return RayActorPool(setup, choice.workers)
    return (
        TorchrunPool(setup) if choice.executor == "torchrun" else ProcessPool(setup, choice.workers)
    )
