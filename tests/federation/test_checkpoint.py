"""Checkpoints, and the store of private state, through crashes, damage and with limited memory."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetero_fl.federation.store import (
    BlobStore,
    Checkpoints,
    PrivateState,
    StateStore,
    read_checkpoint,
)
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import CodecError
from tests.support.calls import record_calls
from tests.support.federations import MIXED, config, rounds_of, same_bits


def checkpoints_in(
    folder: Path, log: Callable[[str], object] = pytest.fail, memory: int = 1 << 20
) -> Checkpoints:
    return Checkpoints(StateStore(folder, memory), log)


def files(folder: Path) -> list[Path]:
    """Return the checkpoints and blobs in a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(content: bytes, number: int, rng: random.Random) -> bytes:
    """Truncate the content, extend it, or flip one bit."""
    at = rng.randrange(len(content))
    if number % 10 == 0:
        return content + b"0"
    if number % 3 == 0:
        return content[:at]
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def test_damaged_checkpoint_is_detected_and_previous_used(tmp_path: Path) -> None:
    messages: list[str] = []
    rounds = rounds_of(
        config("hybrid", MIXED, algorithm__heads="keep"), num_rounds=0, store=StateStore(tmp_path)
    )
    checkpoints = Checkpoints(rounds.store, messages.append)
    previous: list[Path] = []
    for i in (1, 2, 3):
        rounds.run_round()
        previous = files(tmp_path)
        path = checkpoints.save(i, {"run": rounds.state_dict()})
    # All clients take part: each of two checkpoints has its own states, tree, head and name.
    newest = [file for file in files(tmp_path) if file not in previous]
    assert len(newest) == 6 and len(files(tmp_path)) == 12
    rng = random.Random(1)
    for i in range(500):
        file = newest[i % 6]
        content = file.read_bytes()
        file.write_bytes(damaged(content, i, rng))
        if i % 7 == 0 and file != path:
            file.unlink()
        with pytest.raises((CodecError, OSError)) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
        if i % 20 < 6:
            messages.clear()
            loaded = checkpoints.load_newest()
            assert loaded is not None and loaded["run"]["completed"] == 2
            (message,) = messages
            assert message.startswith("round-000003.ckpt: damaged") and "\n" not in message
        file.write_bytes(content)
    assert read_checkpoint(path)[0]["run"]["completed"] == 3


def test_damaged_shared_state_is_detected(tmp_path: Path) -> None:
    messages: list[str] = []
    checkpoints = checkpoints_in(tmp_path, messages.append)
    for i, clients in enumerate((("a", "b"), ("a",), ("c",))):
        for client in clients:
            checkpoints.store.stage(client, private(i + len(client), 500))
        checkpoints.store.commit()
        checkpoints.save(i, {"round": i})
    name = checkpoints.store.committed["b"]
    # Both clients started with this state.
    path = tmp_path / "blobs" / name[:2] / name
    content = path.read_bytes()
    path.write_bytes(damaged(content, 1, random.Random(0)))
    store = StateStore(tmp_path)
    store.reset({"b": name})
    with pytest.raises(RunFailedError, match=f"the private state of b is damaged .*{name}"):
        store.get("b")
    with pytest.raises(RunFailedError, match="all checkpoints are damaged"):
        checkpoints.load_newest()
    assert len(messages) == 2 and name in messages[0]
    checkpoints.store.stage("d", content)
    checkpoints.blobs.sync()
    assert checkpoints.load_newest() == {"round": 2}


def test_checkpoint_of_earlier_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "round-000004.ckpt"
    path.write_bytes(b"HFLCKPT2" + bytes(500))

    with pytest.raises(UserError, match=r"000004.ckpt: written by an earlier .*; start a new run"):
        checkpoints_in(tmp_path).load_newest()


def test_missing_checkpoint_is_none_and_only_damaged_ones_fail(tmp_path: Path) -> None:
    messages: list[str] = []
    checkpoints = checkpoints_in(tmp_path, messages.append)
    assert checkpoints.load_newest() is None and not messages
    for i in (1, 2):
        checkpoints.save(i, {}).write_bytes(b"")
    with pytest.raises(
        RunFailedError, match="all checkpoints are damaged; start a new run in another folder"
    ):
        checkpoints.load_newest()
    newer, older = messages
    assert newer.startswith("round-000002.ckpt: damaged") and newer.endswith(
        "; using the previous checkpoint"
    )
    assert older.startswith("round-000001.ckpt: damaged") and "previous" not in older


def test_run_continues_from_previous_checkpoint(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path, lambda line: None)
    for i in range(3):
        checkpoints.store.stage("a", PrivateState(state={"n": i}))
        checkpoints.store.commit()
        last = checkpoints.save(i, {"round": i})
    last.write_bytes(last.read_bytes()[:-1])
    again = checkpoints_in(tmp_path, lambda line: None)
    assert again.load_newest() == {"round": 1} and again.store.get("a").state == {"n": 1}
    again.save(2, {"round": 2, "again": True})
    assert checkpoints_in(tmp_path).load_newest() == {"round": 2, "again": True}


def test_files_of_killed_process_are_removed(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(0, {"round": 0})
    before = files(tmp_path)
    checkpoints.store.stage("a", private(1, 10))
    checkpoints.store.commit()
    checkpoints.store.stage("b", private(2, 10))
    checkpoints.blobs.sync()
    checkpoints.store.stage("c", private(3, 10))
    assert len(files(tmp_path)) == len(before) + 3
    again = checkpoints_in(tmp_path)
    assert again.load_newest() == {"round": 0} and again.store.encoded("a") is None
    again.save(0, {"round": 0})
    assert files(tmp_path) == before


def test_full_disk_keeps_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(0, {"round": 0})
    checkpoints.store.stage("a", private(1, 100))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(1, {"round": 1})
    assert checkpoints_in(tmp_path).load_newest() == {"round": 0}
    checkpoints.store.commit()
    checkpoints.save(1, {"round": 1})
    again = checkpoints_in(tmp_path)
    assert again.load_newest() == {"round": 1} and again.store.get("a").state == {"n": 1}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are in /proc")
def test_blobs_are_flushed_before_the_checkpoint_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = record_calls(monkeypatch, os, "fsync", lambda f: os.readlink(f"/proc/self/fd/{f}"))
    record_calls(monkeypatch, os, "replace", lambda source, target: str(target), done)
    checkpoints = checkpoints_in(tmp_path / "run")
    checkpoints.store.stage("a", private(1, 100))
    checkpoints.save(0, {"round": 0})

    named = done.index(str(tmp_path / "run" / "round-000000.ckpt"))
    blobs = [path for path in files(tmp_path) if path.parent.parent.name == "blobs"]
    assert len(blobs) == 3
    for blob in blobs:
        renamed = done.index(str(blob))
        assert done.index(str(blob.with_suffix(".tmp"))) < renamed
        # The folders hold the names.
        for folder in (blob.parent, tmp_path / "run" / "blobs", tmp_path / "run"):
            assert renamed < done.index(str(folder)) < named


def test_large_trees_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    monkeypatch.setattr("hetero_fl.federation.store.PIECE", mib)
    models = {
        f"group{i}": {"w": torch.full((mib // 4,), float(i)), "n": torch.tensor(i)}
        for i in range(24)
    }
    tree = {"server": {"models": models, "state": {"scale": [1.0, None]}}, "completed": 7}
    checkpoints = checkpoints_in(tmp_path)
    tracemalloc.start()
    checkpoints.save(7, tree)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    # Its tensors are counted.
    read = checkpoints.load_newest()
    loaded = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written < 6 * mib and loaded < (24 + 6) * mib
    assert (
        read is not None
        and read["completed"] == 7
        and read["server"]["state"] == tree["server"]["state"]
    )
    assert all(same_bits(models[g], read["server"]["models"][g]) for g in models)


CLIENTS = [f"site_{i}" for i in range(5)]


MEMORY = st.sampled_from([0, 500, 3000, 1 << 30])


State = dict[str, bytes]


def private(n: int, size: int) -> PrivateState:
    """Return state that is identified by a number, or empty state of size 0."""
    return (
        PrivateState({"model": {"w": torch.full((size,), float(n))}}, {"n": n})
        if size
        else PrivateState()
    )


class Machine(RuleBasedStateMachine):
    """A state machine.

    `kept` and `staged` are the expected contents; `saved` the states of complete checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.kept: State = {}
        self.staged: State = {}
        self.saved: list[State] = []
        self.round, self.n = 0, 0
        self.stamps: dict[str, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(memory=MEMORY)
    def start(self, memory: int) -> None:
        self.store = StateStore(self.folder, memory)
        self.stamps.clear()
        self.checkpoints = Checkpoints(self.store, lambda line: None)

    @rule(
        client=st.sampled_from(CLIENTS), size=st.sampled_from([0, 1, 100, 700]), sent=st.booleans()
    )
    def stage(self, client: str, size: int, sent: bool) -> None:
        self.n += 1
        state = private(self.n, size)
        self.staged[client] = state.encode()
        self.store.stage(client, state.encode() if sent else state)

    @rule(client=st.sampled_from(CLIENTS))
    def drop(self, client: str) -> None:
        self.staged.pop(client, None)
        self.store.discard_client(client)

    @rule()
    def commit(self) -> None:
        self.kept = {c: s for c, s in {**self.kept, **self.staged}.items() if s}
        self.staged.clear()
        self.store.commit()

    @rule()
    def discard(self) -> None:
        self.staged.clear()
        self.store.discard()

    @rule(server=st.sampled_from([1, 2000]))
    def save(self, server: int) -> None:
        self.round += 1
        self.checkpoints.save(self.round, {"round": self.round, "server": torch.zeros(server)})
        self.saved = [*self.saved[-1:], dict(self.kept)]

    @rule()
    @precondition(lambda self: self.saved)
    def save_the_same_round_again(self) -> None:
        self.checkpoints.save(self.round, {"round": self.round})
        self.saved[-1] = dict(self.kept)

    @rule(memory=MEMORY)
    def crash(self, memory: int) -> None:
        self.start(memory)
        tree = self.checkpoints.load_newest()
        assert (tree is None) == (not self.saved) and (tree is None or tree["round"] == self.round)
        self.kept = dict(self.saved[-1]) if self.saved else {}
        # The clients of staged states train again.
        self.staged = {}

    @rule(memory=MEMORY, at=st.floats(0, 0.999), blob=st.booleans())
    @precondition(lambda self: len(self.saved) == 2)
    def crash_and_damage(self, memory: int, at: float, blob: bool) -> None:
        path = self.folder / f"round-{self.round:06}.ckpt"
        if blob:
            head = path.read_text()
            path = self.folder / "blobs" / head[:2] / head
        path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])
        self.saved.pop()
        self.round -= 1
        self.crash(memory)

    @invariant()
    def same_state(self) -> None:
        for client in CLIENTS:
            encoded, stamp = self.store.encoded(client), self.store.committed.get(client)
            assert encoded == self.kept.get(client) and (stamp is None) == (encoded is None)
            if stamp is not None and encoded is not None:
                assert self.stamps.setdefault(stamp, encoded) == encoded
            assert self.store.get(client).encode() == self.kept.get(client, b"")

    @invariant()
    def within_memory(self) -> None:
        assert 0 <= self.store.cached_bytes <= self.store.memory


Machine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


TestStore = pytest.mark.slow(Machine.TestCase)


def test_store_in_memory_matches_store_on_disk() -> None:
    store = StateStore(memory=0)
    store.stage("a", private(1, 100))
    assert store.encoded("a") is None and store.committed.get("a") is None
    store.commit()
    first = store.committed.get("a")
    assert store.get("a").models["model"]["w"].tolist() == [1.0] * 100 and first is not None
    store.stage("a", private(2, 100).encode())
    store.discard_client("a")
    store.stage("b", private(3, 1))
    store.discard()
    store.commit()
    assert (
        store.committed.get("a") == first
        and store.encoded("a") == private(1, 100).encode()
        and store.encoded("b") is None
    )
    store.stage("a", private(2, 100))
    store.commit()
    assert store.committed.get("a") != first and store.get("a").state == {"n": 2}
    store.stage("a", PrivateState())
    store.commit()
    assert not store.committed and store.get("a") == PrivateState() and store.cached_bytes == 0
    with pytest.raises(ValueError, match="store: must have a folder"):
        Checkpoints(store, pytest.fail)


def test_partial_commit_keeps_other_clients_staged() -> None:
    store = StateStore(memory=0)
    store.stage("a", private(1, 10))
    store.stage("b", private(2, 10))

    store.commit(["a", "c"])

    assert store.encoded("a") == private(1, 10).encode()
    assert store.encoded("b") is None
    assert set(store.staged) == {"b"}


def test_discard_keeps_committed_state(tmp_path: Path) -> None:
    store = StateStore(tmp_path, 0)
    checkpoints = Checkpoints(store, pytest.fail)
    store.stage("a", private(1, 700))
    store.commit()
    # The same state belongs to two clients.
    store.stage("b", private(1, 700))
    store.stage("c", private(2, 700))
    store.discard()
    assert store.get("a").state == {"n": 1} and store.encoded("b") is None
    checkpoints.save(1, {})
    assert len(files(tmp_path)) == 4
    assert store.get("a").state == {"n": 1}


def test_repeated_checkpoint_replaces_the_file_but_keeps_state(tmp_path: Path) -> None:
    store = StateStore(tmp_path, 0)
    checkpoints = Checkpoints(store, pytest.fail)
    store.stage("a", private(1, 5000))
    store.commit()
    store.stage("b", private(2, 5000))
    for _ in range(2):
        checkpoints.save(1, {})
    assert store.get("a").state == {"n": 1}
    store.commit()
    assert store.get("b").state == {"n": 2}


def test_restored_state_equals_its_bytes_and_shares_no_memory(tmp_path: Path) -> None:
    """Check the memory layout, which decides the last bits of a convolution."""
    w = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for store in (StateStore(), StateStore(tmp_path)):
        store.stage("a", PrivateState({"model": {"w": w, "row": w[0]}}, {"pair": (1, 2)}))
        store.commit()
        got = store.get("a")
        assert torch.equal(got.models["model"]["w"], w) and got.models["model"]["w"].stride() == (
            75,
            25,
            5,
            1,
        )
        assert got.models["model"]["row"].untyped_storage().nbytes() == 75 * 4 and got.state == {
            "pair": [1, 2]
        }


def test_round_writes_only_changed_state(tmp_path: Path) -> None:
    """Train 10 of 500 clients: write their states, and 50 bytes per client for the names."""
    checkpoints = Checkpoints(StateStore(tmp_path, 0), pytest.fail)
    blob = len(private(0, 10_000).encode())
    known: set[Path] = set()
    for round_idx, cohort in enumerate((500, 10, 20, 10)):
        for i in range(cohort):
            checkpoints.store.stage(f"site_{i}", private(1000 * round_idx + i, 10_000))
        checkpoints.store.commit()
        checkpoints.save(round_idx, {})
        size = sum(path.stat().st_size for path in set(files(tmp_path)) - known)
        known.update(files(tmp_path))
        assert cohort * blob < size < cohort * (blob + 10) + 50 * 500


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Read, stage, commit and restore 60 clients of 400 kB with a limit of 4 MB."""
    bound, size = 4_000_000, 100_000
    checkpoints = Checkpoints(StateStore(tmp_path, bound), pytest.fail)
    tracemalloc.start()
    for round_idx in range(3):
        for i in range(60):
            checkpoints.store.get(f"site_{i}")
            checkpoints.store.stage(f"site_{i}", private(60 * round_idx + i, size))
            assert checkpoints.store.cached_bytes <= bound
        checkpoints.store.commit()
        checkpoints.save(round_idx, {})
    again = Checkpoints(StateStore(tmp_path, bound), pytest.fail)
    again.load_newest()
    for i in range(60):
        assert again.store.get(f"site_{i}").state == {"n": 120 + i}
        assert again.store.cached_bytes <= bound
    # And state that fits is cached.
    assert again.store.cached_bytes > bound - 8 * size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two stores, and temporary copies.
    assert peak < 2 * bound + 5 * 4 * size


def test_recently_used_state_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path, 3 * 4100)
    for i in range(5):
        store.stage(f"site_{i}", private(i, 1000))
    store.commit()
    for i in (1, 2, 3, 1):
        store.get(f"site_{i}")
    store.get("site_4")
    get = Mock(return_value=private(9, 1).encode())
    monkeypatch.setattr(BlobStore, "get", get)
    assert [store.get(f"site_{i}").state["n"] for i in (1, 3, 4)] == [1, 3, 4]
    assert get.call_count == 0
    assert store.get("site_2").state["n"] == 9 and get.call_count == 1


def test_files_of_replaced_states_are_removed(tmp_path: Path) -> None:
    """The two newest checkpoints and one kept round have their states, and nothing else is left."""
    checkpoints, rng = Checkpoints(StateStore(tmp_path, 0), pytest.fail), random.Random(0)
    saved: list[dict[str, bytes]] = []
    for round_idx in range(20):
        states = dict(saved[-1]) if saved else {}
        for client in rng.sample(range(40), 40 if round_idx == 0 else 3):
            states[f"site_{client}"] = private(100 * round_idx + client, 1000).encode()
            checkpoints.store.stage(f"site_{client}", states[f"site_{client}"])
        checkpoints.store.commit()
        saved.append(states)
        # A resumed run does not know yet which blobs the older checkpoints name.
        if round_idx == 10:
            checkpoints = checkpoints_in(tmp_path)
            checkpoints.load_newest()
            saved[-1] = saved[-2]
        checkpoints.save(round_idx, {"round": round_idx}, kept_rounds=[4])
    live = {state for round_idx in (4, 18, 19) for state in saved[round_idx].values()}
    # Each checkpoint has its name, head and tree.
    assert len(files(tmp_path)) == len(live) + 9
    again = checkpoints_in(tmp_path)
    for round_idx in (4, 18, 19):
        assert again.load(round_idx) == {"round": round_idx}
        assert {c: again.store.encoded(c) for c in saved[round_idx]} == saved[round_idx]
