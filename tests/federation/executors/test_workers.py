"""Worker processes: their number, the order, a death change no bit; whatever ends a run, no process is left."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hetero_fl.communication.protocol import Message
from hetero_fl.core.payload import Payload, loss_from_report
from hetero_fl.engine.templates import TaskCosts
from hetero_fl.experiment import run
from hetero_fl.federation.executors import processes, workers
from hetero_fl.federation.executors.processes import ProcessPool, SharedMemoryConnection
from hetero_fl.federation.executors.workers import (
    JobResult,
    RemoteTracebackError,
    Worker,
    WorkerJob,
    WorkerSetup,
)
from hetero_fl.utils.errors import RunFailedError
from tests.helpers.small_federations import broadcasts, config
from tests.helpers.workers import (
    METHODS,
    PATIENCE,
    ROOT,
    Here,
    comes,
    environment,
    gone,
    members,
    outcome,
    rounds_on,
    setup_of,
)

Made = tuple[WorkerSetup, ProcessPool, dict[str, Any]]
WILD = {"name": "wild", "model": "mlp", "optimizer": {"lr": 1e30}}


@pytest.fixture(scope="module", params=METHODS)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    """A method's workers, and what it computes without them."""
    setup = setup_of(request.param)
    crew = ProcessPool(setup, size := 3 if request.param == "hybrid" else 2)
    yield setup, crew, outcome(rounds_on(setup, None))
    crew.size = size
    crew.close()


@pytest.fixture(scope="module")
def fedper() -> Iterator[tuple[WorkerSetup, ProcessPool]]:
    """Workers of a method whose clients keep their heads; one of the clients always diverges."""
    large = {"name": "mlp", "hidden": [400]}  # travels through shared memory
    groups = [{"name": "calm", "count": 3, "model": ["cnn_bn_small", large]}, WILD]
    setup = setup_of(
        config("fedper", rounds=3, seed=1, clients__per_round=3, clients__groups=groups)
    )
    crew = ProcessPool(setup, 2)
    yield setup, crew
    crew.close()


def test_any_number_of_workers_in_any_order_computes_what_one_process_does(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, crew, want = made
    most = crew.size
    for size in range(1, most + 1):
        assert outcome(rounds_on(setup, crew, size)) == want
    for salt in range(2):
        shuffled = lambda self, client, s=salt: (  # noqa: E731
            hashlib.sha256(f"{s}{client}".encode()).digest()[0] / 255
        )
        monkeypatch.setattr(TaskCosts, "cost_of", shuffled)
        assert outcome(rounds_on(setup, crew, most)) == want


def test_clients_of_a_chunk_have_requests_of_their_own() -> None:
    setup = replace(setup_of(config("fedavg", "mlp", clients=3)), chunk=3)
    bodies = broadcasts(rounds_on(setup, None), setup.federation.client_infos)
    requests = {
        client: Message("train", body, step_share=share)
        for (client, body), share in zip(bodies.items(), (1.0, 0.5, 0.25), strict=True)
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


def killing(crew: Any, monkeypatch: pytest.MonkeyPatch, which: Any) -> list[int]:
    """SIGKILL workers that have jobs which `which` picks, and no result of them yet; the killed are listed."""
    send, killed = crew.send, []

    def send_and_kill(worker: int, job: WorkerJob) -> None:
        process = crew._workers[worker][0]
        if not which(job):
            send(worker, job)
            return
        killed.append(process.pid)
        os.kill(process.pid, signal.SIGSTOP)  # or it might answer before it dies
        send(worker, job)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(crew, "send", send_and_kill)
    return killed


def test_a_worker_killed_in_mid_round_or_a_client_that_diverges_changes_nothing(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, crew = fedper
    want = outcome(rounds_on(setup, None))
    assert any("wild" in record["failed"] for record in want["records"])
    killed = killing(crew, monkeypatch, lambda job: job.number in (2, 5))
    assert outcome(rounds_on(setup, crew, 2)) == want and len(killed) == 2


def test_a_worker_that_dies_with_its_result_in_the_pipe_is_replaced(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one's first result names shared memory that is handed over as it is read: by nobody any more."""
    setup, crew = fedper
    want = outcome(rounds_on(setup, None), 1)
    rounds, plain, killed = rounds_on(setup, crew, 2), crew.receive, list[int | None]()
    for worker in range(2):
        crew._end(worker)
        crew._workers[worker] = crew._start(worker)

    answered: set[int] = set()

    def receive() -> tuple[int, JobResult | None]:
        for worker, jobs in busy.items():
            process, end = crew._workers[worker]
            answers = jobs and any(c != "wild" for c in jobs[0].clients)
            if not killed and answers and worker not in answered:
                assert end.connection.poll(PATIENCE)
                process.kill()
                process.join()
                killed.append(process.pid)
        worker, result = plain()
        answered.add(worker)
        return worker, result

    monkeypatch.setattr(crew, "receive", receive)
    busy = rounds.executor._running  # type: ignore[attr-defined]
    assert outcome(rounds, 1) == want and len(killed) == 1
    assert not {process.pid for process, _ in crew._workers} & set(killed)


def test_an_idle_worker_that_dies_is_replaced(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, crew = fedper
    want = outcome(rounds_on(setup, None), 1)
    rounds = rounds_on(setup, crew, 2)
    rounds.executor.pool.size = 1  # type: ignore[attr-defined]  # the second is not given anything
    os.kill(crew._workers[1][0].pid or 0, signal.SIGKILL)
    crew._workers[1][0].join()
    assert outcome(rounds, 1) == want


@pytest.mark.parametrize("during", ["_to_reference", "_from_reference"])
def test_a_worker_that_is_interrupted_in_sending_or_receiving_is_replaced(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """As by Ctrl-C in a notebook, where the same rounds then go on."""
    setup, crew = fedper
    want = outcome(rounds_on(setup, None), 1)
    rounds = rounds_on(setup, crew, 2)
    before = [process for process, _ in crew._workers]
    plain, interrupted = getattr(SharedMemoryConnection, during), list[str]()

    def changed(self: SharedMemoryConnection, *args: Any) -> Any:
        if not interrupted:
            interrupted.append("once")
            raise KeyboardInterrupt
        return plain(self, *args)

    monkeypatch.setattr(SharedMemoryConnection, during, changed)
    with pytest.raises(KeyboardInterrupt):
        rounds.run_round()
    assert outcome(rounds, 1) == want
    assert sorted(process.exitcode or 0 for process in before) == [-signal.SIGKILL, 0]


def test_interrupted_worker_is_replaced_before_its_next_result_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every second result is large; the others' block of memory is too small for it.
    models = [{"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [400]}]
    groups = [{"name": "calm", "count": 8, "model": models}]
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 10.0 - int(client[-1]))
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    crew = ProcessPool(setup, 1)
    rounds = rounds_on(setup, crew, cohort=8)
    plain, calls = SharedMemoryConnection.receive, itertools.count(1)

    def receive(self: SharedMemoryConnection) -> Any:
        if next(calls) == 3:
            self.connection.recv()
            assert self.connection.poll(PATIENCE)
            time.sleep(0.2)  # until the whole of the next message is there
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(SharedMemoryConnection, "receive", receive)
    with pytest.raises(KeyboardInterrupt):
        rounds.run_round()
    assert outcome(rounds, 1) == outcome(rounds_on(setup, None, cohort=8), 1)
    crew.close()


class Pipe:
    """A connection that is not of the usual class, as on Windows."""

    def __init__(self, plain: Any) -> None:
        self.fileno, self.send, self.recv, self.close = (
            plain.fileno,
            plain.send,
            plain.recv,
            plain.close,
        )


def test_any_kind_of_connection_will_do(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, crew = fedper
    before = [process.pid for process, _ in crew._workers]
    for _, end in crew._workers:
        monkeypatch.setattr(end, "connection", Pipe(end.connection))
    assert outcome(rounds_on(setup, crew, 2), 1) == outcome(rounds_on(setup, None), 1)
    assert before == [process.pid for process, _ in crew._workers]


def test_workers_without_shared_memory_for_the_data_end_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(
        RunFailedError,
        match=r"^runtime\.executor: not enough shared memory for the workers' data \(unable .*No space",
    ):
        ProcessPool(setup_of("fedavg"), 2)


def test_only_clients_with_private_state_are_remembered() -> None:
    """Of a large population, everybody would be in the end."""
    for method, some in (("fedavg", False), ("fedper", True)):
        crew = Here(setup := setup_of(method), 2)
        rounds = rounds_on(setup, crew, 2)
        assert outcome(rounds, 2) == outcome(rounds_on(setup, None), 2)
        assert bool(rounds.executor._holders) is some  # type: ignore[attr-defined]
        assert [bool(worker._used) for worker in crew.workers] == [some, some]


@pytest.mark.parametrize("held", [0.5, 1.5, 2.5, 3.5])
def test_worker_keeps_dropped_state_for_waiting_job(
    held: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [{"name": "calm", "count": 8, "model": {"name": "mlp", "hidden": [8]}}]
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    want = outcome(alone := rounds_on(setup, None, cohort=8))
    size = alone.store.num_bytes("calm_1")
    monkeypatch.setattr(workers, "MAX_HELD_STATE_BYTES", int(held * size))
    crew = Here(setup, 2)
    assert outcome(rounds_on(setup, crew, 2, cohort=8)) == want
    assert crew.waited
    for worker in crew.workers:
        assert worker.store.cached_bytes <= (held + 1) * size


@pytest.mark.parametrize("count", [4, 8])
def test_a_task_that_is_given_up_leaves_no_trace(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that fails in the middle can be held once more: what was being computed for it is not used."""
    groups = [{"name": "calm", "count": count, "model": {"name": "mlp", "hidden": [8]}}]
    setup = setup_of(config("fedper", rounds=3, clients__groups=groups))
    want = outcome(rounds_on(setup, None, cohort=count))
    # Not the seconds that were measured: by them the client that fails may be the last one.
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 1.0)
    crew = Here(setup, 2)
    rounds = rounds_on(setup, crew, 2, cohort=count)
    first, receive, refused = rounds.run_round(), rounds.decode_upload, list[Any]()

    def fail_once(client: Any, *rest: Any) -> Any:
        if not refused:
            refused.append(client)
            raise RunFailedError("on purpose")
        return receive(client, *rest)

    rounds.decode_upload, up, down = fail_once, rounds.traffic.up, rounds.traffic.down  # type: ignore[method-assign]
    with pytest.raises(RunFailedError, match="on purpose"):
        rounds.run_round()
    # Still at work on clients of the round that failed, which come first in the next one.
    at_work = {client for jobs in crew.jobs.values() for job in jobs for client in job.clients}
    assert at_work
    monkeypatch.setattr(TaskCosts, "cost_of", lambda self, client: 1.0 + (client in at_work))
    crew.turned = True
    rounds.store.discard()
    rounds.traffic.up, rounds.traffic.down = up, down
    again = outcome(rounds, 2)
    again["records"].insert(0, {k: v for k, v in first.items() if k != "seconds"})
    assert again == want


def test_three_deaths_on_one_client_end_the_run(
    fedper: tuple[WorkerSetup, ProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, crew = fedper
    rounds = rounds_on(setup, crew, 2)
    client = rounds.sample_cohort(0)[0]
    killed = killing(crew, monkeypatch, lambda job: client in job.clients)
    with pytest.raises(
        RunFailedError,
        match=rf"^3 workers died while computing {client}; is there enough memory\?$",
    ):
        rounds.run_round()
    assert len(killed) == 3


@pytest.mark.parametrize("method", ["Fails", "Leaves"])
def test_an_exception_in_a_worker_is_told_in_one_line(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # however long it takes to end: else it is killed
    monkeypatch.setattr(processes, "EXIT_SECONDS", PATIENCE)
    source = config(f"python:tests.helpers.failing_methods:{method}", "mlp")
    source["runtime"] |= {"executor": "processes", "workers": 1 if method == "Leaves" else 2}
    before = multiprocessing.active_children()
    with pytest.raises(RunFailedError) as told:
        run(source, out=tmp_path / "workers")
    assert set(multiprocessing.active_children()) <= set(before)
    if method == "Leaves":
        assert str(told.value) == "a worker process ended with status 3; see its error output"
        return
    assert isinstance(told.value.__cause__, RemoteTracebackError) and "ZeroDivisionError" in str(
        told.value.__cause__
    )
    source["runtime"]["executor"] = "serial"
    with pytest.raises(RunFailedError) as here:
        run(source, out=tmp_path / "here")
    assert str(told.value) == str(here.value) and "\n" not in str(told.value)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("when", ["starting", "waiting"])
def test_no_process_is_left_when_a_run_is_stopped(
    end: signal.Signals, when: str, tmp_path: Path
) -> None:
    """As workers start, or in the middle of a job that would take long."""
    source = config("python:tests.helpers.failing_methods:Waits", "mlp")
    source["runtime"] |= {"executor": "processes", "workers": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "c.yaml", "--out", "out", "--allow-code"],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    there = tmp_path / "waiting" if when == "waiting" else tmp_path / "out" / "checkpoint"
    assert comes(lambda: there.exists() or process.poll() is not None) and process.poll() is None
    assert len(members(process.pid)) >= 3
    if end is signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does
    else:
        process.send_signal(end)
    _, said = process.communicate(timeout=PATIENCE)
    assert gone(process.pid)
    if end is not signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in said
        assert said.splitlines()[-1].startswith("interrupted; to resume:")
