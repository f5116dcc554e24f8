"""Runs, nodes and servers that are killed at random moments resume to the same bits.

A failure prints the seed of the moments; the environment variable HETERO_FL_KILL_SEED repeats them.
HETERO_FL_KILLS sets the number of kills of each mode: 34 are 102 in all.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from hetero_fl import run
from tests.support import asynchronous_runs, server_crash
from tests.support.federations import MIXED, TOP, config, stop_after
from tests.support.nodes import LONG, Point, Sites, federation, patient_nodes, same
from tests.support.run_directories import files_of_newest
from tests.support.workers import figures, models

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("HETERO_FL_KILLS", "4"))


@pytest.fixture
def draw() -> random.Random:
    """Return a generator of moments, whose seed is printed if the test fails."""
    seed = os.environ.get("HETERO_FL_KILL_SEED") or str(secrets.randbits(32))
    print(f"repeat these moments with HETERO_FL_KILL_SEED={seed}")
    return random.Random(seed)


# Runs on one machine


def source(mode: str, **changes: Any) -> dict[str, Any]:
    """Return a run with private heads and compression residuals.

    A simulated run has devices, faults and a deadline; an asynchronous one, devices and faults.
    """
    run_config = config(
        "hybrid",
        MIXED,
        clients=4,
        rounds=4,
        clients__per_round=3,
        server={"model": "mlp"},
        algorithm__heads="keep",
        devices={"speed": {"median": 1e6, "sigma": 0.9}, "up": 1e5},
        faults={"lost": 0.1, "corrupted": 0.1, "twice": 0.1},
        cohort={"sampling": "available", "deadline": 60},
        channel=TOP,
        **changes,
    )
    if mode == "sync":
        run_config |= {"devices": {}, "faults": {}, "cohort": {}}
    if mode == "async":
        run_config["runtime"] |= {"mode": "async", "buffer": 2}
        run_config |= {"faults": asynchronous_runs.FAULTS, "cohort": {}}
    return run_config


def results(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Return the saved models and the records of a run."""
    return models(out), figures(out)


@pytest.mark.parametrize("mode", ["sync", "simulated", "async"])
def test_killed_run_resumes_to_the_same_bits(
    mode: str, draw: random.Random, tmp_path: Path
) -> None:
    # The server process imports the package once, before the timing.
    server_crash.start_run(source(mode), tmp_path / "warm").join()
    started = time.monotonic()
    server_crash.start_run(source(mode), tmp_path / "plain").join()
    seconds = time.monotonic() - started
    expected = results(tmp_path / "plain")
    assert len(expected[1]) == 4

    for number in range(KILLS):
        out = tmp_path / f"killed{number}"
        process = server_crash.start_run(source(mode), out)
        if number % 2:
            server_crash.wait_for(out / "metrics.jsonl", process)
        time.sleep(draw.uniform(0.0, 0.97) * seconds)
        process.kill()
        process.join()
        run(source(mode), out=out, resume=True)
        assert results(out) == expected, f"kill {number}"
        assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("mode", ["simulated", "async"])
def test_run_killed_between_writes_resumes_to_the_same_bits(mode: str, tmp_path: Path) -> None:
    run_config = source(mode, output__report=True)
    run(run_config, out=tmp_path / "plain")

    for number, point in enumerate(server_crash.POINTS):
        out = tmp_path / f"killed{number}"
        server_crash.kill_at(point, run_config, out)
        assert not (out / "report.html").exists()
        # A file that is replaced does not change its links.
        links = shutil.copytree(
            out, tmp_path / f"links{number}", ignore=lambda *_: {"log.txt"}, copy_function=os.link
        )
        before = {path: path.read_bytes() for path in links.rglob("*") if path.is_file()}
        run(run_config, out=out, resume=True)
        assert {path: path.read_bytes() for path in before} == before, point
        assert results(out) == results(tmp_path / "plain"), point
        assert (out / "report.html").exists()


# A damaged newest checkpoint, as a power failure leaves it

STOP = 3
# Positions as shares of the file's length.
PLACE = st.floats(0, 1, exclude_max=True)


@pytest.fixture(scope="module", params=["sync", "async"])
def stopped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """Return a configuration, and a folder with the whole run and one stopped before its end."""
    runtime = {"mode": "async", "buffer": 2} if request.param == "async" else {}
    run_config = config(
        "fedper",
        ["linear", {"name": "mlp", "hidden": [8]}, {"name": "mlp", "hidden": [8]}],
        5,
        rounds=STOP + 1,
        clients__per_round=2,
        data__train_limit=200,
        data__partition__min_size=15,
        data__proxy__size=0,
        channel=TOP,
        devices=asynchronous_runs.SLOW,
        faults=asynchronous_runs.FAULTS,
        runtime={"threads": 1, **runtime},
    )
    folder = tmp_path_factory.mktemp(request.param)

    with pytest.raises(KeyboardInterrupt):
        run(run_config, out=folder / "stopped", callbacks=[stop_after(STOP)])
    run(run_config, out=folder / "whole")
    return run_config, folder


def flip(at: float, bit: int = 0) -> Callable[[bytes], bytes]:
    """Flip one bit of the byte at this position."""

    def damage(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]

    return damage


def cut(at: float) -> Callable[[bytes], bytes]:
    """Truncate the file at this position."""
    return lambda data: data[: int(at * len(data))]


def blank(at: float) -> Callable[[bytes], bytes]:
    """Zero a block, like a disk page that was never written."""

    def damage(data: bytes) -> bytes:
        place = int(at * len(data))
        return data[:place] + bytes(min(4096, len(data) - place)) + data[place + 4096 :]

    return damage


DAMAGE = st.one_of(
    st.builds(flip, PLACE, st.integers(0, 7)), st.builds(cut, PLACE), st.builds(blank, PLACE)
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
# The first byte, and the last.
@example(flip(0.0), 0)
@example(lambda data: flip((len(data) - 1) / len(data), 7)(data), 1)
@example(cut(0.0), 2)
@example(lambda data: data + b"more", 0)
@given(DAMAGE, st.integers(0, 100))
def test_run_with_damaged_newest_checkpoint_uses_the_previous_one(
    stopped: tuple[dict[str, Any], Path], damage: Callable[[bytes], bytes], which: int
) -> None:
    run_config, folder = stopped
    out = folder / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "stopped", out)
    newest = files_of_newest(out / "checkpoint")
    assert len(newest) > 3
    file = newest[which % len(newest)]
    file.write_bytes(damage(file.read_bytes()))

    run(run_config, out=out, resume=True)

    assert results(out) == results(folder / "whole")


# Servers and nodes

CLIENTS = ["site_1", "site_2", "site_3"]
SECURE = {"secure_sum": {"threshold": 2}}
DEPLOYED: dict[str, dict[str, Any]] = {
    "hybrid": config("hybrid", MIXED, rounds=3, channel=TOP, algorithm__heads="keep"),
    "fedavg": config("fedavg", rounds=3, clients__per_round=2),
    "secure sum": config("fedper", rounds=3, channel=SECURE),
}
# Messages of a round: those of training, and three of an evaluation.
MESSAGES = {"hybrid": 6, "fedavg": 5, "changes down": 6, "secure sum": 15}


@pytest.fixture
def nodes() -> Iterator[None]:
    with patient_nodes():
        yield


@pytest.mark.parametrize("kind", DEPLOYED)
def test_killed_server_resumes_to_the_same_bits(
    kind: str, draw: random.Random, nodes: None, tmp_path: Path
) -> None:
    sites = Sites(CLIENTS, tmp_path / "sites")
    # Nine messages until all are ready; then those of three rounds, which these do not exceed.
    per_round = MESSAGES[kind]
    crashes = [9 + draw.randint(1, most) for most in (per_round, per_round, per_round - 1)]

    deployed = federation(DEPLOYED[kind], sites, tmp_path / "deployed", crashes)

    same(deployed, run(DEPLOYED[kind], out=tmp_path / "simulated"))


@pytest.mark.parametrize("kind", ["hybrid", "secure sum"])
def test_killed_nodes_change_no_bits(
    kind: str, draw: random.Random, nodes: None, tmp_path: Path
) -> None:
    """Let nodes end before, during and after their answers, or lose these."""
    exchanges, faults = ["train", "read"], ["before", "after", "unheard", "lost"]
    if kind == "secure sum":
        # A node that ends while it answers cannot know whether its masked vector was sent.
        exchanges = ["keys", "shares", "train", "consistency", "unmask"]
    kills: dict[Point, str] = {
        (draw.choice(CLIENTS), round_idx, exchange): draw.choice(faults)
        for round_idx in range(3)
        for exchange in exchanges
    }
    if kind == "hybrid":
        kills[draw.choice(CLIENTS), draw.randrange(3), "train"] = "during"
    planned = len(kills)
    sites = Sites(CLIENTS, tmp_path / "sites", kills, away=draw.choice([0.0, 1.0]))

    deployed = federation(DEPLOYED[kind], sites, tmp_path / "deployed", patience=LONG)

    # A node that is away in one exchange may not be asked in the next.
    assert len(sites.kills) < planned / 2
    same(deployed, run(DEPLOYED[kind], out=tmp_path / "simulated"))
