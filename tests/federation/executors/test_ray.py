"""Runs on Ray, on a cluster of two nodes on this machine: same bits, whatever is lost on the way."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.federation.test_crashes import figures, models
from tests.helpers import asynchronous_runs
from tests.helpers.small_federations import TOP, config
from tests.helpers.workers import (
    PATIENCE,
    ROOT,
    comes,
    environment,
    first_job,
    gone,
    left_sealed,
    outcome,
    rounds_on,
    setup_of,
)

pytest.importorskip("ray", reason="ray is not installed: pip install 'hetero_fl[ray]'")

import ray
from ray.cluster_utils import Cluster

from hetero_fl.experiment import run
from hetero_fl.federation.executors.ray import RayActor, RayActorPool, _store_setup
from hetero_fl.federation.executors.workers import WorkerJob, WorkerSetup
from hetero_fl.utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own warnings are none of ours
MEMORY = 100 << 20  # bytes of a node's object store


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes; this process is connected to the first."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": MEMORY}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.add_node(**node)
    ray.init(address=made.address, log_to_driver=False, logging_level=40)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def setup() -> WorkerSetup:
    """Clients keep their heads."""
    return setup_of("fedper")


@pytest.fixture(scope="module")
def want(setup: WorkerSetup) -> dict[str, Any]:
    """What the run comes to in one process."""
    return outcome(rounds_on(setup, None))


def ask(crew: RayActorPool, worker: int, what: Any) -> Any:
    """Have a function called where a worker is."""
    return ray.get(crew._workers[worker][0].__ray_call__.remote(lambda actor: what()))


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def when_sent(
    crew: RayActorPool,
    monkeypatch: pytest.MonkeyPatch,
    mine: Callable[[int], bool],
    pids: list[int],
    act: Callable[[], object],
) -> list[int]:
    """Do it once a worker that is `mine` has been sent a job of a later round, and can have answered nothing."""
    send, done = crew.send, list[int]()

    def watched(worker: int, job: WorkerJob) -> None:
        if (
            {request.round_idx for request in job.requests.values()} != {1}
            or done
            or not mine(worker)
        ):
            send(worker, job)
            return
        done.append(worker)
        os.kill(pids[worker], signal.SIGSTOP)  # or it might answer before
        send(worker, job)
        act()
        with suppress(ProcessLookupError):  # it may have gone with its node
            os.kill(pids[worker], signal.SIGKILL)

    monkeypatch.setattr(crew, "send", watched)
    return done


def test_same_bits_from_data_that_is_read_where_it_lies(
    cluster: Cluster, setup: WorkerSetup, want: dict[str, Any]
) -> None:
    placed = _store_setup(setup)
    raw, *copies = (
        s.federation.data.public_sets["proxy"].examples.x
        for s in (setup, ray.get(placed), ray.get(placed))
    )
    assert copies[0].data_ptr() == copies[1].data_ptr() and torch.equal(copies[0], raw)
    crew = RayActorPool(setup, 2)
    assert ask(crew, 0, node_id) != ask(crew, 1, node_id)
    assert outcome(rounds_on(setup, crew, 2)) == want
    crew.close()
    assert ray.is_initialized()  # the cluster is not the run's


def test_what_leaves_a_machine_carries_its_checksum(setup: WorkerSetup) -> None:
    assert left_sealed(RayActor(setup, 0).run_job(first_job(setup)))


@pytest.mark.slow
def test_results_of_a_worker_are_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second may arrive sooner, because it is smaller."""
    pool = RayActorPool.__new__(RayActorPool)
    pool._workers = []
    pool._tasks = [deque(["a1", "a2"]), deque(["b1"]), deque()]
    arrived = iter([["a2", "b1"], ["a1", "a2"], ["a2"]])

    def wait(tasks: list[str], timeout: float) -> tuple[list[str], list[str]]:
        now = next(arrived)
        return [task for task in tasks if task in now], []

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda task: task)
    assert [pool.receive() for _ in range(3)] == [(1, "b1"), (0, "a1"), (0, "a2")]


def test_a_worker_killed_and_a_node_lost_in_mid_round_change_nothing(
    cluster: Cluster, setup: WorkerSetup, want: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = RayActorPool(setup, 2)
    homes, pids = ([ask(crew, worker, f) for worker in (0, 1)] for f in (node_id, os.getpid))
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    assert set(homes) == {cluster.head_node.node_id, second.node_id}

    with monkeypatch.context() as patch:
        killed = when_sent(
            crew, patch, lambda worker: homes[worker] != second.node_id, pids, lambda: None
        )
        assert outcome(rounds_on(setup, crew, 2)) == want
    assert ask(crew, killed[0], os.getpid) not in pids

    def lose() -> None:
        cluster.remove_node(second, allow_graceful=False)
        # Until the cluster knows, it would put the worker's successors where nothing is any more.
        assert comes(
            lambda: (
                not any(node["Alive"] and node["NodeID"] == second.node_id for node in ray.nodes())
            )
        )

    lost = when_sent(crew, monkeypatch, lambda worker: homes[worker] == second.node_id, pids, lose)
    assert outcome(rounds_on(setup, crew, 2)) == want
    assert lost and cluster.list_all_nodes() == [cluster.head_node]
    crew.close()


WAITS = """
import sys, time
from pathlib import Path
from hetero_fl.cli import main
from hetero_fl.federation.asynchronous import AsynchronousTrainer

run_round = AsynchronousTrainer.run_round

def run_round_and_wait(self):
    record = run_round(self)
    if self.completed == 2:  # the second round is over, and nothing of it is written
        Path("waits").touch()
        time.sleep(10_000)
    return record

AsynchronousTrainer.run_round = run_round_and_wait
sys.exit(main(sys.argv[1:], command="train"))
"""


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on_on_the_cluster(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Asynchronous, with tasks in flight: Hybrid with heads of their own and top-k, everything going wrong."""
    made = asynchronous_runs.source(
        "hybrid",
        algorithm__heads="keep",
        channel=TOP,
        rounds=4,
    )
    run(made, out=tmp_path / "plain")
    made["runtime"] |= {"executor": "ray", "workers": 1, "address": cluster.address}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(made))
    driver = subprocess.Popen(
        [sys.executable, "-c", WAITS, "--config", "c.yaml", "--out", "out"],
        cwd=tmp_path, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert comes(lambda: (tmp_path / "waits").exists() or driver.poll() is not None)
    os.killpg(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL and not (tmp_path / "out" / "summary.json").exists()
    run(made, out=tmp_path / "out", resume=True)
    assert "resumed after round" in (tmp_path / "out" / "log.txt").read_text()
    assert models(tmp_path / "out") == models(tmp_path / "plain")
    assert figures(tmp_path / "out") == figures(tmp_path / "plain")


def test_more_workers_than_the_cluster_has_room_for(cluster: Cluster, tmp_path: Path) -> None:
    source = config("fedavg", "mlp", runtime={"executor": "ray", "workers": 50, "threads": 2})
    with pytest.raises(
        UserError,
        match=r"^runtime\.workers: 50 with 2 threads each exceed the \d CPUs of the cluster",
    ):
        run(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cluster_of_its_own_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C ends the run, the workers and the cluster."""
    source = config(
        "fedavg", "mlp", rounds=100_000, runtime={"executor": "ray", "workers": 1, "threads": 1}
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source))
    folder = tempfile.mkdtemp(dir="/tmp")  # a short path: Ray's sockets lie in it
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "c.yaml", "--out", "out"],
        cwd=tmp_path, env={**environment(), "TMPDIR": folder, "RAY_ADDRESS": ""}, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert comes(
        lambda: (tmp_path / "out" / "metrics.jsonl").exists() or process.poll() is not None
    )
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("interrupted; to resume:")
    first = [line.split()[0] for line in said.splitlines()[:4]]
    assert first == ["data:", "ray", "1", "1"]  # the run, the reasons, and nothing of Ray's
    assert (
        gone(process.pid)
        and not list(Path(folder).glob("hetero_fl-*"))
        and comes(lambda: not naming(folder), 0.1)
    )
    shutil.rmtree(folder)


def naming(text: str) -> list[str]:
    """Command lines of processes in which it stands."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
