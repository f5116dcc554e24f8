"""Runs on a Ray cluster of two local nodes: bit-identical results despite failures."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import yaml

from tests.support.federations import config
from tests.support.workers import (
    PATIENCE,
    ROOT,
    environment,
    eventually,
    outcome,
    rounds_on,
    running_processes,
    session_ends,
    setup_of,
    start_session,
)

pytest.importorskip("ray", reason="ray is not installed: pip install 'hetero_fl[ray]'")

import ray
from ray.cluster_utils import Cluster

from hetero_fl.experiment import run
from hetero_fl.federation.executors.ray import RayActorPool, _store_setup
from hetero_fl.federation.executors.workers import JobResult, WorkerJob, WorkerSetup
from hetero_fl.utils.errors import UserError

# Ray emits warnings that this project cannot avoid.
pytestmark = pytest.mark.filterwarnings("default")
# Bytes of a node's object store.
MEMORY = 100 << 20
# Ray lowers the priority of its workers, which would wait for the tests of other files.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start two nodes and connect this process to the first."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": MEMORY}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def setup() -> WorkerSetup:
    """Return a worker setup in which clients keep their heads."""
    return setup_of("fedper")


@pytest.fixture(scope="module")
def expected(setup: WorkerSetup) -> dict[str, Any]:
    """Return the results of the run in one process."""
    return outcome(rounds_on(setup, None))


def ask(pool: RayActorPool, worker: int, what: Any) -> Any:
    """Call a function in a worker's process."""
    return ray.get(pool._actors[worker].__ray_call__.remote(lambda actor: what()))


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def act_on_submit(
    pool: RayActorPool,
    monkeypatch: pytest.MonkeyPatch,
    mine: Callable[[int], bool],
    pids: list[int],
    act: Callable[[], object],
) -> list[int]:
    """Act once, when the worker that is `mine` has a job of a later round, and kill it."""
    exchange, done = pool.exchange, list[int]()
    (chosen,) = filter(mine, range(pool.size))

    def end() -> None:
        act()
        # The process may have ended with its node.
        with suppress(ProcessLookupError):
            os.kill(pids[chosen], signal.SIGKILL)

    def watched(worker: int, job: WorkerJob) -> JobResult:
        rounds = {request.round_idx for request in job.requests.values()}
        if rounds == {1} and worker == chosen and not done:
            done.append(chosen)
            # Otherwise the worker might answer first.
            os.kill(pids[chosen], signal.SIGSTOP)
            Timer(1.0, end).start()
        return exchange(worker, job)

    monkeypatch.setattr(pool, "exchange", watched)
    return done


def test_ray_workers_read_shared_data_and_match_one_process(
    cluster: Cluster, setup: WorkerSetup, expected: dict[str, Any]
) -> None:
    placed = _store_setup(setup)
    raw, *copies = (
        s.federation.data.public_sets["proxy"].examples.x
        for s in (setup, ray.get(placed), ray.get(placed))
    )
    assert copies[0].data_ptr() == copies[1].data_ptr() and torch.equal(copies[0], raw)
    pool = RayActorPool(setup, 2)
    assert ask(pool, 0, node_id) != ask(pool, 1, node_id)
    assert outcome(rounds_on(setup, pool, 2)) == expected
    pool.close()
    # The run did not start the cluster.
    assert ray.is_initialized()


def test_killed_worker_and_lost_node_change_nothing(
    cluster: Cluster, setup: WorkerSetup, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = RayActorPool(setup, 2)
    homes, pids = ([ask(pool, worker, f) for worker in (0, 1)] for f in (node_id, os.getpid))
    second = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    assert set(homes) == {cluster.head_node.node_id, second.node_id}

    with monkeypatch.context() as patch:
        killed = act_on_submit(
            pool, patch, lambda worker: homes[worker] != second.node_id, pids, lambda: None
        )
        assert outcome(rounds_on(setup, pool, 2)) == expected
    assert ask(pool, killed[0], os.getpid) not in pids

    def kill_node() -> None:
        cluster.remove_node(second, allow_graceful=False)
        # Before it notices, the cluster would place new workers on the lost node.
        assert eventually(
            lambda: (
                not any(node["Alive"] and node["NodeID"] == second.node_id for node in ray.nodes())
            )
        )

    lost = act_on_submit(
        pool, monkeypatch, lambda worker: homes[worker] == second.node_id, pids, kill_node
    )
    assert outcome(rounds_on(setup, pool, 2)) == expected
    assert lost and cluster.list_all_nodes() == [cluster.head_node]
    pool.close()


def test_too_many_workers_for_the_cluster_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    source = config("fedavg", "mlp", runtime={"executor": "ray", "workers": 50, "threads": 2})
    with pytest.raises(
        UserError,
        match=r"^runtime\.workers: 50 with 2 threads each exceed the \d CPUs of the cluster",
    ):
        run(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_local_cluster_is_shut_down_on_ctrl_c(tmp_path: Path) -> None:
    source = config(
        "fedavg", "mlp", rounds=100_000, runtime={"executor": "ray", "workers": 1, "threads": 1}
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(source))
    # A short path, because Ray creates sockets in it.
    folder = tempfile.mkdtemp(dir="/tmp")
    process = start_session(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "c.yaml", "--out", "out"],
        cwd=tmp_path,
        env={**environment(), "TMPDIR": folder, "RAY_ADDRESS": ""},
    )
    assert eventually(
        lambda: (tmp_path / "out" / "metrics.jsonl").exists() or process.poll() is not None
    )
    # As a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("interrupted; to resume:")
    first = [line.split()[0] for line in output.splitlines()[:4]]
    # The run and the reasons, and no lines of Ray.
    assert first == ["data:", "ray", "1", "1"]
    assert (
        session_ends(process.pid)
        and not list(Path(folder).glob("hetero_fl-*"))
        and eventually(
            lambda: (
                not any(folder.encode() in b" ".join(words) for _, words, _ in running_processes())
            ),
            0.1,
        )
    )
    shutil.rmtree(folder)
