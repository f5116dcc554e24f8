"""Worker processes: neither their number nor their failures change results or leave processes."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from hetero_fl.communication.protocol import Message
from hetero_fl.core.payload import Item, Payload, loss_from_report
from hetero_fl.engine.templates import TaskCosts
from hetero_fl.experiment import run
from hetero_fl.federation.executors import processes, workers
from hetero_fl.federation.executors.processes import (
    LONG,
    ProcessPool,
    SharedMemoryBlock,
    SharedMemoryConnection,
)
from hetero_fl.federation.executors.workers import (
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerJob,
    WorkerSetup,
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
        shuffled = lambda self, client, s=salt: (  # noqa: E731
            hashlib.sha256(f"{s}{client}".encode()).digest()[0] / 255
        )
        monkeypatch.setattr(TaskCosts, "cost_of", shuffled)
        assert outcome(rounds_on(setup, pool, most)) == expected


def test_warnings_of_workers_are_issued_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(config("fedavg", "mlp", clients=3, rounds=2))
    pool = LocalWorkerPool(setup, 2)
    train = Worker._run_chunk

    def warn(self: Worker, job: WorkerJob, chunk: list[str], result: JobResult) -> None:
        warnings.warn("few rows", MissingRowsWarning, stacklevel=1)
        train(self, job, chunk, result)

    monkeypatch.setattr(Worker, "_run_chunk", warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome(rounds_on(setup, pool, 2))

    issued = [w for w in caught if str(w.message) == "few rows"]
    assert [(w.category, w.filename) for w in issued] == [(UserWarning, __file__)]


def test_warnings_cross_process_boundaries() -> None:
    with record_warnings() as recorded:
        warnings.warn("few rows", MissingRowsWarning, stacklevel=1)

    sent = pickle.loads(pickle.dumps(JobResult(1, warnings=recorded)))

    assert sent.warnings == recorded


def test_clients_of_a_chunk_have_separate_requests() -> None:
    setup = replace(setup_of(config("fedavg", "mlp", clients=3)), chunk=3)
    bodies = broadcasts(rounds_on(setup, None), setup.federation.client_infos)
    requests = {
        client: Message("train", body, attempt=attempt)
        for attempt, (client, body) in enumerate(bodies.items())
    }
    losses = []
    for chunks in ([[*requests]], [[client] for client in requests]):
        replies = Worker(setup, 0).run_job(WorkerJob(0, "answer", chunks, requests, {})).replies
        losses.append(
            {
                client: loss_from_report(Payload.decode(reply.body).report)
                for client, reply in replies.items()
                if isinstance(reply, Message)
            }
        )
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def kill_workers(pool: Any, monkeypatch: pytest.MonkeyPatch, which: Any) -> list[int]:
    """Kill workers that were sent a job matched by `which`; return their process ids."""
    send, killed = pool.send, []

    def send_and_kill(worker: int, job: WorkerJob) -> None:
        process = pool._workers[worker][0]
        if not which(job):
            send(worker, job)
            return
        killed.append(process.pid)
        # Otherwise the worker might answer before it is killed.
        os.kill(process.pid, signal.SIGSTOP)
        send(worker, job)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(pool, "send", send_and_kill)
    return killed


def test_killed_worker_and_diverging_client_change_nothing(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool = fedper
    expected = outcome(rounds_on(setup, None))
    assert any("wild" in record["failed"] for record in expected["records"])
    killed = kill_workers(pool, monkeypatch, lambda job: job.number in (2, 5))
    assert outcome(rounds_on(setup, pool, 2)) == expected and len(killed) == 2


def test_dead_idle_worker_is_replaced(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool = fedper
    expected = outcome(rounds_on(setup, None), 1)
    rounds = rounds_on(setup, pool, 2)
    rounds.executor.pool.size = 1  # type: ignore[attr-defined]  # The second gets no jobs.
    os.kill(pool._workers[1][0].pid or 0, signal.SIGKILL)
    pool._workers[1][0].join()
    assert outcome(rounds, 1) == expected


def test_interrupted_worker_is_replaced_before_its_next_result_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every second result is large; the others' block of memory is too small for it.
    models = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [400]}]
    groups = [{"name": "calm", "count": 8, "model": models}]
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 10.0 - int(client[-1]))
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    pool = ProcessPool(setup, 1)
    rounds = rounds_on(setup, pool, cohort=8)
    plain, calls = SharedMemoryConnection.receive, itertools.count(1)

    def receive(self: SharedMemoryConnection) -> Any:
        if next(calls) == 3:
            self.connection.recv()
            assert self.connection.poll(PATIENCE)
            # Until the next message is complete.
            time.sleep(0.2)
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(SharedMemoryConnection, "receive", receive)
    with pytest.raises(KeyboardInterrupt):
        rounds.run_round()
    assert outcome(rounds, 1) == outcome(rounds_on(setup, None, cohort=8), 1)
    pool.close()


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


@each_case("num_states", [0.5, 1.5, 2.5, 3.5])
def test_worker_keeps_dropped_state_for_waiting_job(
    num_states: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [{"name": "calm", "count": 8, "model": {"name": "mlp", "hidden": [8]}}]
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    expected = outcome(single := rounds_on(setup, None, cohort=8))
    size = single.store.num_bytes("calm_1")
    monkeypatch.setattr(workers, "MAX_HELD_STATE_BYTES", int(num_states * size))
    pool = LocalWorkerPool(setup, 2)
    assert outcome(rounds_on(setup, pool, 2, cohort=8)) == expected
    assert pool.waited
    for worker in pool.workers:
        assert worker.store.cached_bytes <= (num_states + 1) * size


@each_case("count", [4, 8])
def test_abandoned_task_has_no_effect(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat a round that failed in the middle; its pending results are not used."""
    groups = [{"name": "calm", "count": count, "model": {"name": "mlp", "hidden": [8]}}]
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    expected = outcome(rounds_on(setup, None, cohort=count))
    # Not the measured seconds, by which the failing client might come last.
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 1.0)
    pool = LocalWorkerPool(setup, 2)
    rounds = rounds_on(setup, pool, 2, cohort=count)
    first, receive, refused = rounds.run_round(), rounds.link.decode_upload, list[Any]()

    def fail_once(client: Any, *rest: Any) -> Any:
        if not refused:
            refused.append(client)
            raise RunFailedError("on purpose")
        return receive(client, *rest)

    rounds.link.decode_upload, up, down = fail_once, rounds.traffic.up, rounds.traffic.down  # type: ignore[method-assign]
    with pytest.raises(RunFailedError, match="on purpose"):
        rounds.run_round()
    # Workers are busy with clients of the failed round, which come first in the next one.
    at_work = {client for jobs in pool.jobs.values() for job in jobs for client in job.clients}
    assert at_work
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 1.0 + (client in at_work))
    pool.turned = True
    rounds.store.discard()
    rounds.traffic.up, rounds.traffic.down = up, down
    again = outcome(rounds, 2)
    again["records"].insert(0, {k: v for k, v in first.items() if k != "seconds"})
    assert again == expected


def test_three_worker_deaths_on_one_client_end_the_run(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, pool = fedper
    rounds = rounds_on(setup, pool, 2)
    client = rounds.sample_cohort(0)[0]
    killed = kill_workers(pool, monkeypatch, lambda job: client in job.clients)
    with pytest.raises(
        RunFailedError,
        match=rf"^{client}: 3 workers died during its tasks; if they ran out of memory, reduce "
        r"runtime\.workers or runtime\.chunk$",
    ):
        rounds.run_round()
    assert len(killed) == 3


@pytest.mark.parametrize("method", ["Fails", "Exits", "Leaves"])
def test_exception_in_worker_is_reported_in_one_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise a slow process would be killed.
    monkeypatch.setattr(processes, "EXIT_SECONDS", PATIENCE)
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


def ends(remembered: int = 2) -> tuple[SharedMemoryConnection, SharedMemoryConnection]:
    one, other = multiprocessing.Pipe()
    return SharedMemoryConnection(one, sent_strings=remembered), SharedMemoryConnection(
        other, received_strings=remembered
    )


def transfer(message: Any, sender: SharedMemoryConnection, receiver: SharedMemoryConnection) -> Any:
    """Send a message and return what arrives; receive concurrently, because pipes are small."""
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(receiver.receive)
        sender.send(message)
        return received.result(timeout=PATIENCE)


def test_messages_arrive_complete() -> None:
    one, other = ends()
    long, longer = bytes(range(256)) * (LONG // 256), b"x" * (3 * LONG + 1)
    for message in (
        {"a": long, "b": [longer, b"short", long], "c": "text"},
        [longer],
        b"",
        [b"y" * LONG, long],
    ):
        assert transfer(message, one, other) == message
        back = [message, len(message)]
        # Through the shared memory of the other end.
        assert transfer(back, other, one) == back


def test_reused_memory_does_not_change_received_strings() -> None:
    one, other = ends(remembered=0)
    kept = []
    for byte in b"abc":
        kept.append(transfer(bytes([byte]) * LONG, one, other))
    assert [string[:1] + string[-1:] for string in kept] == [b"aa", b"bb", b"cc"]


def test_two_messages_may_be_sent_before_one_is_read() -> None:
    one, other = ends(remembered=0)
    for _ in range(3):
        first, second = b"a" * LONG, b"b" * LONG
        one.send(first)
        one.send(second)
        assert (other.receive(), other.receive()) == (first, second)


def test_known_strings_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ends()
    first, second, third = (bytes([b]) * (LONG + b) for b in b"abc")
    filled = record_calls(monkeypatch, SharedMemoryBlock, "fill", lambda _, strings: len(strings))
    got = []
    for string in (first, second, first, second, third, second, first, third):
        got.append(transfer([string, string], one, other))
    assert [g[0] for g in got] == [first, second, first, second, third, second, first, third]
    # Both ends forget the oldest of two strings.
    assert filled == [1, 1, 0, 0, 1, 0, 1, 0]
    assert len(one._sent.strings) == len(other._received.strings) == 2
    equal = bytes(bytearray(third))
    # An equal string, but a different object.
    assert transfer(equal, one, other) == third and filled[-1] == 1


def test_strings_without_room_in_shared_memory_use_the_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ends(remembered=1)
    small, large, larger = (
        byte * size for byte, size in ((b"s", LONG), (b"l", 2 * LONG), (b"m", 3 * LONG))
    )

    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    for room, strings in (
        (True, [small]),
        (False, [large, larger]),
        (False, [larger, small]),
        (True, [large]),
    ):
        if not room:
            monkeypatch.setattr(torch.Tensor, "share_memory_", full)
        assert transfer(strings, one, other) == strings
        monkeypatch.undo()


def test_payload_tensors_arrive_as_writable_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ends(remembered=0)
    # Both ends.
    sizes = record_calls(monkeypatch, Connection, "_send_bytes", lambda _, data: len(data))
    model = {
        "weight": torch.randn(300, 200),
        "strided": torch.randn(50, 40).T,
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    sent = Payload({"model": Item(model, torch.rand(3), "params")}, {"loss": "1.5"})

    got = transfer(Message("upload", sent), one, other).content
    transfer(Message("upload", Payload({"model": torch.zeros(70_000)})), one, other)

    assert sum(sizes) < LONG
    assert got.encode() == sent.encode()
    # A writable copy.
    got["model"]["weight"].add_(1)
    assert torch.equal(got["model"]["strided"], model["strided"])
