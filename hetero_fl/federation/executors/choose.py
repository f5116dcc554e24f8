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
from hetero_fl.core.model_spec import Architecture
from hetero_fl.engine.prediction_cache import make_performer
from hetero_fl.engine.templates import RATE, description, recurrent, work
from hetero_fl.federation.channel import make_protocol
from hetero_fl.federation.client_runtime import Site
from hetero_fl.federation.executors.base import Executor, InProcess
from hetero_fl.federation.executors.processes import Processes
from hetero_fl.federation.executors.torchrun import Ranks, ranks
from hetero_fl.federation.executors.workers import Crew, Setup, Workers
from hetero_fl.federation.federation import Federation
from hetero_fl.federation.state_store import Store
from hetero_fl.utils.environment import choose_device, cores, limit_of_threads
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.text import plural

# What some executors need around a run, before anything is written: a cluster to compute on, a
# launch by torchrun.

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"


@contextmanager
def engine(config: RuntimeConfig, executor: str) -> Iterator[None]:
    """Have what the executor needs. Raises UserError, in one line that helps, if it is not to be had."""
    if executor == "torchrun" and ranks() == 1:
        raise UserError(
            f"runtime.executor: torchrun needs two processes or more, launched by it: {LAUNCH}"
        )
    if executor != "torchrun" and ranks() > 1:
        raise UserError(
            f"runtime.executor: found '{config.executor}', but torchrun started {ranks()} processes; "
            "write runtime.executor=torchrun"
        )
    if executor != "ray":
        yield
        return
    if find_spec("ray") is None:
        raise UserError("runtime.executor: ray is not installed: pip install 'hetero_fl[ray]'")
    from hetero_fl.federation.executors.ray import connected

    with connected(
        config.address, (config.workers or cores()) * (config.threads or limit_of_threads() or 1)
    ):
        yield


def crew_size(
    executor: str, asked: int | None, threads: int, most: int, available: int
) -> tuple[int, str]:
    """How many workers of so many threads an executor gets on so many cores, and why; not more than `most` unless asked.

    Raises UserError if a cluster has no room for them.
    """
    if executor == "torchrun":
        return ranks() - 1, "ranks but the first"
    if executor != "ray":
        return asked or max(
            1, min(available // threads, most)
        ), "runtime.workers" if asked else "cores"
    from hetero_fl.federation.executors.ray import cpus

    if (asked or 1) * threads > cpus():
        raise UserError(
            f"runtime.workers: found {asked or 1} of {threads} threads, but the cluster has {cpus()} CPUs; "
            "take fewer, or fewer runtime.threads"
        )
    return asked or max(
        1, min(cpus() // threads, most)
    ), "runtime.workers" if asked else "CPUs of the cluster"


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
WORKER, THREAD = 0.9, 0.5
TOGETHER = 8  # clients of one architecture from which computing them together may pay on a CPU
SMALL_STEP = 2e7  # floating-point operations of a step forward up to which it does
SMALL_MODEL = 1_000_000  # parameters up to which it does
IN_PROCESS = ("serial", "batched")
CHUNK = 128  # clients computed together at most: bounds memory
# chunks, or one a core, that a group is cut into for workers, if they are then of TOGETHER clients
# or more
PIECES = 8
USERS = {
    "workers": ("processes", "ray"),
    "chunk": ("batched", "processes", "ray", "torchrun"),
    "address": ("ray",),
}
MOST_THREADS = 4  # of one process: models of this size gain nothing from more


@dataclass(frozen=True)
class Choice:
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
    def recorded(cls, record: Mapping[str, Any], config: RuntimeConfig) -> Choice:
        """The choice that a run began with; the number of workers may be another when it goes on."""
        choice = cls(**{**record, "reasons": tuple(record["reasons"])})
        choose_device(choice.device)  # it has to be here, too
        if choice.executor in IN_PROCESS:
            return choice
        workers, _ = crew_size(
            choice.executor, config.workers, choice.threads, choice.workers, cores()
        )
        return replace(choice, workers=workers)


@dataclass(frozen=True)
class Load:
    """A run's training, estimated."""

    cohort: int  # clients in a round
    seconds: float  # of all rounds, for one core
    traffic: float  # bytes of parameters for each of these seconds
    busy: float  # workers that would be busy: the costliest client keeps one to itself
    step: float  # floating-point operations forward, of a step of the costliest client

    @classmethod
    def of(cls, config: Config, federation: Federation) -> Load:
        """Of a large population, what is known of some of its clients stands for all."""
        some = [federation.cards[id] for id in federation.some]
        cohort = min(len(federation.cards), config.clients.per_round or len(federation.cards))
        each = sum(map(work, some)) / len(some) / RATE
        costliest = max(some, key=work)
        return cls(
            cohort,
            each * cohort * config.rounds,
            sum(4 * description(card.arch).parameters for card in some) / len(some) / each,
            each * cohort / (work(costliest) / RATE),
            costliest.settings.batch_size * description(costliest.arch).forward_flops,
        )


def choose(config: Config, federation: Federation) -> Choice:
    """The choice for a run that begins. Raises UserError if the device is not here."""
    asked, device, available = config.runtime, choose_device(config.runtime.device), cores()
    load = Load.of(config, federation)
    group = _worth_batching(federation, load.cohort, device)
    if asked.executor == "serial" and (asked.chunk or 1) > 1:
        raise UserError(
            f"runtime.chunk: found {asked.chunk}, but the serial executor takes one client at a time; use batched"
        )
    executor, why = asked.executor, "runtime.executor"
    if executor == "auto":
        executor, why = _executor(
            load, group, device, available, asked.threads or limit_of_threads()
        )
    chunk = asked.chunk or (CHUNK if executor == "batched" else 1)
    together = min(chunk, _largest_group(federation, load.cohort)) if executor == "batched" else 1
    threads, server_threads, size = _threads(asked, load, together, executor, available)
    reasons = [f"{executor} executor: {why}", size]
    workers = 1
    if executor not in IN_PROCESS:
        workers, why = crew_size(executor, asked.workers, threads, load.cohort, available)
        reasons.append(f"{workers} workers: {why}")
    pieces = max(PIECES, available)
    if (
        asked.executor == "auto"
        and executor == "processes"
        and not asked.chunk
        and group // pieces >= TOGETHER
    ):
        chunk = min(CHUNK, group // pieces)
        reasons.append(
            f"{chunk} clients at a time: small steps of {group} clients with one architecture"
        )
    if executor == "serial":
        chunk = 1
    for key, users in USERS.items():
        if getattr(asked, key) is not None and executor not in users:
            reasons.append(f"runtime.{key} has no effect: it is for {', '.join(users)}")
    return Choice(
        executor,
        str(device),
        threads,
        server_threads,
        chunk,
        asked.precision,
        workers,
        tuple(reasons),
    )


def _executor(
    load: Load, group: int, device: torch.device, available: int, each: int | None = None
) -> tuple[str, str]:
    """Which, and why; `each`: the threads that a process gets whatever it computes. (Workers that are asked for do not count:
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

    workers = WORKER * min(max(1, available // (each or 1)), load.busy) * speed(each or 1)
    saved = load.seconds / speed(each or MOST_THREADS) - load.seconds / workers
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
    asked: RuntimeConfig, load: Load, together: int, executor: str, available: int
) -> tuple[int, int, str]:
    """Of a process that computes clients, and of the server's; and why."""
    limit = limit_of_threads()
    if asked.threads is not None:
        return asked.threads, asked.threads, f"{plural(asked.threads, 'thread')}: runtime.threads"
    if limit is not None:
        return limit, limit, f"{plural(limit, 'thread')}: OMP_NUM_THREADS"
    large = load.step * together >= LARGE_STEP
    at_server = min(MOST_THREADS, available) if large else 1
    threads = at_server if executor in IN_PROCESS else 1
    size = f"steps are {'large enough' if large else 'too small'} for more than one"
    return (
        threads,
        at_server,
        f"{plural(threads, 'thread')} where clients are computed, {at_server} at the server: {size}",
    )


def _worth_batching(federation: Federation, cohort: int, device: torch.device) -> int:
    """How many clients of a round share an architecture, if computing them together pays for most of the cohort; else 0."""
    groups: dict[Architecture, int] = {}
    for kind in federation.cards.kinds:
        about = description(kind.arch)
        steps = kind.settings.batch_size * about.forward_flops
        if recurrent(kind.arch):
            continue
        if device.type != "cpu" or (steps <= SMALL_STEP and about.parameters <= SMALL_MODEL):
            groups[kind.arch] = groups.get(kind.arch, 0) + kind.count
    share = cohort / len(federation.cards)
    members = max((n * share for n in groups.values()), default=0.0)
    most = 2 * sum(groups.values()) > len(federation.cards)
    return int(members) if most and members >= (TOGETHER if device.type == "cpu" else 2) else 0


def _largest_group(federation: Federation, cohort: int) -> int:
    """How many clients of a round can be computed together, about; 1 or more."""
    groups = Counter[Architecture]()
    for kind in federation.cards.kinds:
        if not recurrent(kind.arch):
            groups[kind.arch] += kind.count
    return max(1, round(max(groups.values(), default=0) * cohort / len(federation.cards)))


def make_executor(
    choice: Choice,
    algorithm: Algorithm,
    federation: Federation,
    store: Store | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Executor:
    """The executor of a choice; `say` is told of what it cannot do as chosen. Sets this process's threads to the server's."""
    torch.set_num_threads(choice.server_threads)
    store, performer = (
        store or Store(),
        make_performer(torch.device(choice.device), choice.chunk, choice.precision, say),
    )
    if choice.executor in IN_PROCESS:
        return InProcess(
            Site(algorithm, federation, store, performer, make_protocol(algorithm, federation)),
            choice.chunk,
        )
    devices: tuple[str, ...] = (choice.device,)
    # spread over all of them; Ray deals them out itself
    if choice.device == "cuda" and choice.executor != "ray":
        devices = tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
    setup = Setup(
        algorithm,
        federation,
        choice.threads,
        devices,
        choice.chunk,
        choice.precision,
        torch.get_default_dtype(),
    )
    return Workers(_crew(choice, setup), federation.cards, store, performer, choice.chunk)


def _crew(choice: Choice, setup: Setup) -> Crew:
    if choice.executor == "ray":
        from hetero_fl.federation.executors.ray import Actors  # an extra

        return Actors(setup, choice.workers)
    return Ranks(setup) if choice.executor == "torchrun" else Processes(setup, choice.workers)
