"""Worker processes: neither their number nor their failures change results or leave processes."""

from __future__ import annotations

import gc
import hashlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, Timer
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from hetero_fl.communication.protocol import Message
from hetero_fl.core.payload import Item, Payload, loss_from_report
from hetero_fl.experiment import run
from hetero_fl.federation.executors import workers as workers_module
from hetero_fl.federation.executors.processes import (
    LONG,
    MAX_BROADCASTS,
    MessageConnection,
    ProcessPool,
)
from hetero_fl.federation.executors.workers import (
    MAX_AHEAD,
    Cohort,
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerDiedError,
    WorkerJob,
    WorkerPool,
    WorkerSetup,
    run_jobs,
)
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.recorded_warnings import record_warnings
from tests.support.calls import record_calls
from tests.support.cases import each_case
from tests.support.federations import broadcasts, config
from tests.support.workers import (
    METHODS,
    PATIENCE,
    ROOT,
    LocalWorkerPool,
    environment,
    eventually,
    outcome,
    rounds_on,
    session_ends,
    session_processes,
    setup_of,
    start_session,
)

WorkerFixture = tuple[WorkerSetup, ProcessPool, dict[str, Any]]


TRAIN = str(ROOT / "scripts" / "train.py")


WILD = {"name": "wild", "model": "mlp", "optimizer": {"lr": 1e30}}


class MissingRowsWarning(UserWarning):
    """A category that other processes do not know."""


@pytest.fixture(scope="module", params=METHODS)
def worker_pool(request: pytest.FixtureRequest) -> Iterator[WorkerFixture]:
    """Return a method's setup, its workers and the results of one process."""
    setup = setup_of(request.param)
    pool = ProcessPool(setup, size := 3 if request.param == "hybrid" else 2)
    yield setup, pool, outcome(rounds_on(setup, None))
    pool.size = size
    pool.close()


@pytest.fixture(scope="module")
def fedper() -> Iterator[tuple[WorkerSetup, ProcessPool]]:
    """Return workers of a method with personal heads; one of the clients always diverges."""
    # Large enough for shared memory.
    large = {"name": "mlp", "hidden": [400]}
    groups = [{"name": "calm", "count": 3, "model": ["cnn_bn_small", large]}, WILD]
    setup = setup_of(
        config("fedper", rounds=3, seed=1, clients__per_round=3, clients__groups=groups)
    )
    pool = ProcessPool(setup, 2)
    yield setup, pool
    pool.close()


def test_workers_in_any_number_and_order_match_one_process(
    worker_pool: WorkerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool, expected = worker_pool
    most = pool.size
    for size in range(1, most + 1):
        assert outcome(rounds_on(setup, pool, size)) == expected
    for salt in range(2):
        shuffled = lambda info, s=salt: (  # noqa: E731
            hashlib.sha256(f"{s}{info.client_id}".encode()).digest()[0] / 255
        )
        monkeypatch.setattr(workers_module, "training_flops", shuffled)
        assert outcome(rounds_on(setup, pool, most)) == expected


def test_warnings_of_workers_are_issued_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(config("fedavg", "mlp", clients=3, rounds=2))
    pool = LocalWorkerPool(setup, 2)
    train = Worker._run_tasks

    def warn(self: Worker, job: WorkerJob, result: JobResult) -> None:
        warnings.warn("few rows", MissingRowsWarning, stacklevel=1)
        train(self, job, result)

    monkeypatch.setattr(Worker, "_run_tasks", warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome(rounds_on(setup, pool, 2))

    issued = [w for w in caught if str(w.message) == "few rows"]
    assert [(w.category, w.filename) for w in issued] == [(UserWarning, __file__)]


def test_warnings_cross_process_boundaries() -> None:
    with record_warnings() as recorded:
        warnings.warn("few rows", MissingRowsWarning, stacklevel=1)

    sent = pickle.loads(pickle.dumps(JobResult(warnings=recorded)))

    assert sent.warnings == recorded


def test_clients_of_a_chunk_have_separate_requests() -> None:
    setup = replace(setup_of(config("fedavg", "mlp", clients=3)), chunk=3)
    bodies = broadcasts(rounds_on(setup, None), setup.federation.client_infos)
    requests = {
        client: Message("train", body, attempt=attempt)
        for attempt, (client, body) in enumerate(bodies.items())
    }
    worker = Worker(setup, 0)
    jobs = [requests], [{client: request} for client, request in requests.items()]
    losses = [
        {
            client: loss_from_report(Payload.decode(reply.body).report)
            for each in parts
            for client, reply in worker.run_job(WorkerJob("answer", each, {})).replies.items()
            if isinstance(reply, Message)
        }
        for parts in jobs
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


@each_case("shares_memory", [True, False])
def test_replies_to_other_machines_have_checksums(shares_memory: bool) -> None:
    setup = replace(setup_of("fedavg"), shares_memory=shares_memory)
    client, body = next(iter(broadcasts(rounds_on(setup, None), ["site_1"]).items()))

    done = Worker(setup, 0).run_job(WorkerJob("answer", {client: Message("train", body)}, {}))

    reply = done.replies[client]
    assert isinstance(reply, Message) and reply.is_intact
    assert (reply.checksum is None) == shares_memory


def kill_workers(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch, which: Any) -> list[WorkerJob]:
    """Kill the worker that has received a job matched by `which`; return such jobs."""
    exchange = pool.exchange
    killed: list[WorkerJob] = []

    def exchange_and_kill(worker: int, job: WorkerJob) -> Any:
        if not which(job):
            return exchange(worker, job)
        killed.append(job)
        process, _ = pool._workers[worker]
        # Otherwise the worker might answer before it is killed.
        os.kill(process.pid or 0, signal.SIGSTOP)
        Timer(0.1, process.kill).start()
        return exchange(worker, job)

    monkeypatch.setattr(pool, "exchange", exchange_and_kill)
    return killed


def test_killed_worker_and_diverging_client_change_nothing(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool = fedper
    expected = outcome(rounds_on(setup, None))
    assert any("wild" in record["failed"] for record in expected["records"])
    numbers = itertools.count()
    killed = kill_workers(pool, monkeypatch, lambda job: next(numbers) in (2, 8))
    lines = record_calls(monkeypatch, pool, "_log", lambda line: line)

    assert outcome(rounds_on(setup, pool, 2)) == expected

    assert len(killed) == 2
    assert lines == ["a worker process was killed; its task starts again in a new process"] * 2


def test_dead_idle_worker_is_replaced(fedper: tuple[WorkerSetup, ProcessPool]) -> None:
    setup, pool = fedper
    expected = outcome(rounds_on(setup, None), 1)
    process, _ = pool._workers[1]
    process.kill()
    wait([process.sentinel])

    assert outcome(rounds_on(setup, pool, 2), 1) == expected


def test_missing_shared_memory_for_data_fails_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = RuntimeError(
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
    )
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=full))
    with pytest.raises(
        RunFailedError,
        match=r"^runtime\.executor: not enough shared memory for the workers' data "
        r"\(unable .*No space",
    ):
        ProcessPool(setup_of("fedavg"), 2)


def test_abandoned_tasks_have_no_effect(fedper: tuple[WorkerSetup, ProcessPool]) -> None:
    """Repeat a round that failed in the middle; the results of its other tasks are not used."""
    setup, pool = fedper
    expected = outcome(rounds_on(setup, None))
    rounds = rounds_on(setup, pool, 2)
    first = rounds.run_round()
    decode = rounds.link.decode_upload
    rounds.link.decode_upload = Mock(side_effect=RunFailedError("on purpose"))  # type: ignore[method-assign]
    with pytest.raises(RunFailedError, match="on purpose"):
        rounds.run_round()
    rounds.link.decode_upload = decode  # type: ignore[method-assign]

    again = outcome(rounds, 2)

    again["records"].insert(0, {k: v for k, v in first.items() if k != "seconds"})
    assert again == expected


class ListPool(LocalWorkerPool):
    """Pool whose results are the jobs themselves."""

    def __init__(self, size: int) -> None:
        WorkerPool.__init__(self, size)
        self.jobs = []

    def submit(self, position: int, job: Any, cohort: Cohort) -> None:
        self.jobs.append(job)
        cohort.outcomes.put((position, job))


def test_expensive_tasks_of_a_small_cohort_start_first() -> None:
    pool = ListPool(2)
    chunks = [[str(i)] for i in range(6)]
    results = run_jobs(pool, chunks, [1.0, 3.0, 2.0, 1.0, 5.0, 4.0], lambda chunk: chunk[0])  # type: ignore[arg-type,return-value]

    assert list(results) == list("012345")
    assert "".join(map(str, pool.jobs)) == "451203"


class LatePool(ListPool):
    """Pool whose first job ends after as many others as may be ahead of it."""

    def submit(self, position: int, job: Any, cohort: Cohort) -> None:
        self.jobs.append(job)
        if position != 0:
            cohort.outcomes.put((position, job))
        if len(self.jobs) == MAX_AHEAD * self.size:
            cohort.outcomes.put((0, self.jobs[0]))


def test_few_results_of_a_large_cohort_wait_in_memory() -> None:
    pool = LatePool(2)
    chunks = [[str(i)] for i in range(100)]
    results = run_jobs(pool, chunks, list(range(100)), lambda chunk: chunk[0])  # type: ignore[arg-type,return-value]

    for requested, (result, chunk) in enumerate(zip(results, chunks, strict=True)):
        assert str(result) == chunk[0]
        assert len(pool.jobs) - requested <= MAX_AHEAD * pool.size


class InstantPool(LocalWorkerPool):
    """Pool whose threads return the jobs themselves."""

    submit = WorkerPool.submit

    def __init__(self, size: int) -> None:
        WorkerPool.__init__(self, size)

    def exchange(self, worker: int, job: Any) -> Any:
        return job


def interrupt_at(step: int, function: Callable[[], Any]) -> bool:
    """Call a function, raise KeyboardInterrupt at a step of this thread, and return if it was."""
    steps = itertools.count()

    def trace(_frame: FrameType, _event: str, _value: Any) -> Any:
        if next(steps) == step:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_pool_ends_after_interrupt_at_any_step() -> None:
    chunks = [["a"], ["b"], ["c"]]
    for step in itertools.count():
        pool = InstantPool(1)

        interrupted = interrupt_at(
            step,
            lambda pool=pool: list(run_jobs(pool, chunks, [1.0] * 3, lambda chunk: chunk[0])),  # type: ignore[arg-type,misc,return-value]
        )

        end = Thread(target=pool.close, daemon=True)
        end.start()
        end.join(PATIENCE / 10)
        assert not end.is_alive(), f"step {step}"
        if not interrupted:
            break
    assert step > 50


class SlowPool(InstantPool):
    """Pool whose jobs wait until the test lets them end."""

    def __init__(self) -> None:
        super().__init__(1)
        self.started: list[Any] = []
        self.may_end: SimpleQueue[None] = SimpleQueue()

    def exchange(self, worker: int, job: Any) -> Any:
        self.started.append(job)
        self.may_end.get()
        return job


def test_abandoned_jobs_do_not_start() -> None:
    pool = SlowPool()
    jobs = run_jobs(pool, [["a"], ["b"], ["c"]], [1.0] * 3, lambda chunk: chunk[0])  # type: ignore[arg-type,return-value]
    pool.may_end.put(None)
    assert next(jobs) == "a"

    jobs.close()
    for _ in range(3):
        pool.may_end.put(None)
    pool.close()

    assert pool.started in (["a"], ["a", "b"])


def test_jobs_of_a_closed_pool_are_refused() -> None:
    pool = SlowPool()
    cohort = Cohort()
    for position, job in enumerate("ab"):
        pool.submit(position, job, cohort)  # type: ignore[arg-type]
    assert eventually(lambda: pool.started == ["a"], 0.01)
    pool._jobs.close()
    pool.may_end.put(None)
    pool.close()

    cohort.wait_for_outcome()
    cohort.wait_for_outcome()

    assert str(cohort.result(0)) == "a"
    with pytest.raises(WorkerDiedError):
        cohort.result(1)
    with pytest.raises(RuntimeError, match="stopped"):
        pool.submit(2, "c", cohort)  # type: ignore[arg-type]


def test_pool_without_references_ends() -> None:
    pool = InstantPool(2)
    cohort = Cohort()
    pool.submit(0, "a", cohort)  # type: ignore[arg-type]
    cohort.wait_for_outcome()
    threads, alive = pool._threads, weakref.ref(pool)

    del pool
    gc.collect()

    for thread in threads:
        thread.join(PATIENCE)
    assert alive() is None


def test_three_worker_deaths_on_one_client_end_the_run(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool = fedper
    rounds = rounds_on(setup, pool, 2)
    client = rounds.sample_cohort(0)[0]
    killed = kill_workers(pool, monkeypatch, lambda job: client in job.requests)
    with pytest.raises(
        RunFailedError,
        match=rf"^{client}: 3 workers died during the same task; if they ran out of memory, reduce "
        r"runtime\.workers or runtime\.chunk$",
    ):
        rounds.run_round()
    assert len(killed) == 3


@pytest.mark.parametrize("method", ["Fails", "Exits", "Leaves"])
def test_exception_in_worker_is_reported_in_one_line(method: str, tmp_path: Path) -> None:
    source = config(f"python:tests.support.failing_methods:{method}", "mlp")
    source["runtime"] |= {"executor": "processes", "workers": 1 if method == "Leaves" else 2}
    before = multiprocessing.active_children()
    with pytest.raises(RunFailedError) as error:
        run(source, out=tmp_path / "workers")
    assert set(multiprocessing.active_children()) <= set(before)
    if method == "Leaves":
        assert str(error.value) == "a worker process exited with status 3; see its error output"
        return
    kind = "ZeroDivisionError" if method == "Fails" else "SystemExit: 3"
    assert isinstance(error.value.__cause__, RemoteTracebackError)
    assert kind in str(error.value.__cause__) and kind in str(error.value)
    source["runtime"]["executor"] = "serial"
    with pytest.raises(RunFailedError) as serial_error:
        run(source, out=tmp_path / "serial")
    assert str(error.value) == str(serial_error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@each_case(
    ("end", "when"), itertools.product([signal.SIGINT, signal.SIGKILL], ["starting", "waiting"])
)
def test_stopped_run_leaves_no_process(end: signal.Signals, when: str, tmp_path: Path) -> None:
    """Stop the run while workers start, or in the middle of a long job."""
    source = config("python:tests.support.failing_methods:Waits", "mlp")
    source["runtime"] |= {"executor": "processes", "workers": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source))
    process = start_session(
        [sys.executable, TRAIN, "--config", "c.yaml", "--out", "out", "--allow-code"],
        cwd=tmp_path,
        env=environment(),
    )
    sign = tmp_path / "waiting" if when == "waiting" else tmp_path / "out" / "checkpoint"
    assert (
        eventually(lambda: sign.exists() or process.poll() is not None) and process.poll() is None
    )
    assert len(session_processes(process.pid)) >= 3
    if end is signal.SIGINT:
        # As a terminal does.
        os.killpg(process.pid, end)
    else:
        process.send_signal(end)
    _, output = process.communicate(timeout=PATIENCE)
    assert session_ends(process.pid)
    if end is not signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in output
        assert output.splitlines()[-1].startswith("interrupted; to resume:")


@pytest.fixture
def ends() -> Iterator[tuple[MessageConnection, MessageConnection]]:
    """Return both ends of a pipe."""
    one, other = multiprocessing.Pipe()
    with one, other:
        yield MessageConnection(one), MessageConnection(other)


Ends = tuple[MessageConnection, MessageConnection]


def received(ends: Ends, message: Any, *rest: Any) -> Any:
    """Send a message, which a pipe may take only while the other end reads; return its copy."""
    sender = Thread(target=ends[0].send, args=(message, *rest))
    sender.start()
    copy = ends[1].receive()
    sender.join()
    return copy


def test_messages_arrive_complete(ends: Ends) -> None:
    long, longer = bytes(range(256)) * (LONG // 256), b"x" * (3 * LONG + 1)
    for message in (
        {"a": long, "b": [longer, b"short", long], "c": "text"},
        [longer],
        b"",
        [b"y" * LONG, long],
    ):
        copy = received(ends, message)
        # The memory of a message is used for the next one, in both directions.
        ends[0]._block.fill_(0)

        assert copy == message
        assert received(ends[::-1], message) == message
    assert ends[0]._block.data_ptr() != 0 and len(ends[0]._block) == len(ends[1]._block)


def test_short_messages_need_no_shared_memory(ends: Ends) -> None:
    copy = received(ends, {"a": b"x" * 100, "b": torch.ones(10)})

    assert torch.equal(copy["b"], torch.ones(10)) and not len(ends[0]._block)


def test_payload_tensors_arrive_as_writable_copies(ends: Ends) -> None:
    model = {
        "weight": torch.randn(300, 300),
        "strided": torch.randn(50, 40).T,
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    sent = Payload({"model": Item(model, torch.rand(3), "params")}, {"loss": "1.5"})

    copy = received(ends, Message("upload", sent)).content

    assert len(ends[1]._block) >= 4 * 300 * 300
    ends[1]._block.fill_(0)
    assert copy.encode() == sent.encode()
    # A writable copy.
    copy["model"]["weight"].add_(1)
    assert torch.equal(copy["model"]["strided"], model["strided"])


def test_messages_without_room_in_shared_memory_use_the_pipe(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    message = [b"a" * LONG, torch.arange(LONG)]
    received(ends, b"b" * LONG)
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=full))

    copy = received(ends, message)

    assert copy[0] == message[0] and torch.equal(copy[1], message[1])
    assert len(ends[0]._block) == LONG


def test_broadcasts_are_kept_within_a_round(ends: Ends) -> None:
    broadcasts = [bytes([i]) * LONG for i in range(MAX_BROADCASTS + 1)]

    def keep(i: int, round_idx: int) -> Any:
        shared = {id(broadcasts[i]): broadcasts[i]}
        (copy,) = received(ends, [broadcasts[i]], shared, round_idx)
        assert copy == broadcasts[i]
        return copy

    first = keep(0, 0)
    assert keep(0, 0) is first
    assert keep(1, 0) is not first and keep(0, 0) is first
    again = keep(0, 1)
    assert again is not first
    for i in range(MAX_BROADCASTS + 1):
        keep(i, 1)
    assert keep(0, 1) is not again and len(ends[1]._received) <= MAX_BROADCASTS


def test_workers_copy_a_broadcast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train five clients on the same model, which is long."""
    large = {"name": "mlp", "hidden": [1200]}
    setup = setup_of(config("fedavg", large, clients=5, rounds=3))
    expected = outcome(rounds_on(setup, None, cohort=5), 2)
    pool = ProcessPool(setup, 2)
    sizes = record_calls(
        monkeypatch, MessageConnection, "_store", lambda _, buffers: sum(map(len, buffers))
    )

    try:
        assert outcome(rounds_on(setup, pool, 2, cohort=5), 2) == expected
    finally:
        pool.close()

    # Once per worker in two rounds and an evaluation of five clients each.
    assert len(sizes) == 15 and 3 <= sum(size >= LONG for size in sizes) <= 6
