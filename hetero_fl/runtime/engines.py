"""What some executors need around a run, before anything is written: a cluster to compute on, a launch by torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from hetero_fl.config.schema import RuntimeConfig
from hetero_fl.environment import cores, limit_of_threads
from hetero_fl.errors import UserError
from hetero_fl.runtime.crews.torchrun import ranks

LAUNCH = "torchrun --nproc-per-node 3 scripts/train.py --config FILE runtime.executor=torchrun"


@contextmanager
def engine(config: RuntimeConfig, executor: str) -> Iterator[None]:
    """Have what the executor needs. Raises UserError, in one line that helps, if it is not to be had."""
    if executor == "torchrun" and ranks() == 1:
        raise UserError(f"runtime.executor: torchrun needs two processes or more, launched by it: {LAUNCH}")
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
    from hetero_fl.runtime.crews.ray import connected

    with connected(config.address, (config.workers or cores()) * (config.threads or limit_of_threads() or 1)):
        yield


def crew_size(executor: str, asked: int | None, threads: int, most: int, available: int) -> tuple[int, str]:
    """How many workers of so many threads an executor gets on so many cores, and why; not more than `most` unless asked.

    Raises UserError if a cluster has no room for them.
    """
    if executor == "torchrun":
        return ranks() - 1, "ranks but the first"
    if executor != "ray":
        return asked or max(1, min(available // threads, most)), "runtime.workers" if asked else "cores"
    from hetero_fl.runtime.crews.ray import cpus

    if (asked or 1) * threads > cpus():
        raise UserError(
            f"runtime.workers: found {asked or 1} of {threads} threads, but the cluster has {cpus()} CPUs; "
            "take fewer, or fewer runtime.threads"
        )
    return asked or max(1, min(cpus() // threads, most)), "runtime.workers" if asked else "CPUs of the cluster"
