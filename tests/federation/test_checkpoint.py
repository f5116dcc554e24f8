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

from hetero_fl.federation import checkpoint
from hetero_fl.federation.checkpoint import Checkpoints, read_checkpoint
from hetero_fl.federation.state_store import COMPACT, OpenSegment, PrivateState, StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import CodecError
from tests.support.cases import each_case
from tests.support.federations import MIXED, config, rounds_of, same_bits


def checkpoints_in(
    folder: Path, log: Callable[[str], object] = pytest.fail, memory: int = 1 << 20
) -> Checkpoints:
    return Checkpoints(StateStore(folder, memory), log)


def files(folder: Path) -> list[str]:
    return [p.name for p in sorted(folder.iterdir())]


def test_damaged_checkpoint_is_detected_and_previous_used(tmp_path: Path) -> None:
    messages: list[str] = []
    rounds = rounds_of(
        config("hybrid", MIXED, algorithm__heads="keep"), num_rounds=0, store=StateStore(tmp_path)
    )
    checkpoints = Checkpoints(rounds.store, messages.append)
    for i in (1, 2, 3):
        rounds.run_round()
        path = checkpoints.save(i, {"run": rounds.state_dict()})
        # All clients take part, so that no older file is needed.
        assert {p.segment.path for p in read_checkpoint(path).locations.values()} == {path}
    assert files(tmp_path) == ["round-000002.ckpt", "round-000003.ckpt"]
    content, rng = path.read_bytes(), random.Random(1)
    assert len(read_checkpoint(path).locations) == 3
    for i in range(240):
        at = rng.randrange(len(content))
        # Every byte at the start and at the end, and random ones between.
        if i < 60:
            at = i
        elif i < 120:
            at = len(content) - 1 - (i - 60)
        damaged = (
            content[:at]
            if i % 3 == 0
            else content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        )
        path.write_bytes(damaged)
        with pytest.raises(CodecError):
            read_checkpoint(path)
        if i % 20 == 0:
            messages.clear()
            newest = checkpoints.load_newest()
            assert newest is not None and newest["run"]["completed"] == 2
            assert (
                len(messages) == 1
                and path.name in messages[0]
                and "damaged" in messages[0]
                and "\n" not in messages[0]
            )


def test_damage_of_live_state_in_older_file_is_detected(
    tmp_path: Path,
) -> None:
    messages: list[str] = []
    checkpoints = checkpoints_in(tmp_path, messages.append)
    for i, clients in enumerate((("a", "b"), ("a",), ("c",))):
        for client in clients:
            checkpoints.store.stage(
                client, PrivateState({"model": {"w": torch.full((500,), float(i))}})
            )
        checkpoints.store.commit()
        checkpoints.save(i, {"round": i})
    first = tmp_path / "round-000000.ckpt"
    content = first.read_bytes()
    live = checkpoints.store.locations()["b"]
    # A byte in the first state of client a.
    dead = live.offset - 10
    for at in range(live.offset, live.offset + live.length, 97):
        first.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CodecError, match=r"round-000000\.ckpt does not match"):
            read_checkpoint(tmp_path / "round-000002.ckpt")
    store = StateStore(tmp_path)
    store.load_locations({"b": live}, {})
    with pytest.raises(RunFailedError, match="the private state of b is damaged on disk"):
        store.get("b")
    first.write_bytes(content[:dead] + bytes([content[dead] ^ 1]) + content[dead + 1 :])
    newest = checkpoints.load_newest()
    assert newest == {"round": 2} and not messages
    first.unlink()
    with pytest.raises(RunFailedError, match="all checkpoints are damaged"):
        checkpoints.load_newest()
    assert len(messages) == 2


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
    checkpoints.store.stage("a", PrivateState(state={"n": 1}))
    checkpoints.store.commit()
    assert len(files(tmp_path)) == 2
    again = checkpoints_in(tmp_path)
    assert again.load_newest() == {"round": 0} and again.store.encoded("a") is None
    assert files(tmp_path) == ["round-000000.ckpt"]


def test_full_disk_keeps_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(0, {"round": 0})

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            checkpoints.save(1, {"round": 1})
    assert files(tmp_path)[1:] == ["round-000000.ckpt"]
    checkpoints.save(1, {"round": 1})
    assert checkpoints_in(tmp_path).load_newest() == {"round": 1}


def test_large_trees_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    monkeypatch.setattr(checkpoint, "PIECE", mib)
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
        self.stamps: dict[tuple[int, str], bytes] = {}

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
        self.saved = [*self.saved[-1:], (dict(self.kept), dict(self.staged))]

    @rule()
    @precondition(lambda self: self.saved)
    def save_the_same_round_again(self) -> None:
        self.checkpoints.save(self.round, {"round": self.round})
        self.saved[-1] = (dict(self.kept), dict(self.staged))

    @rule(memory=MEMORY)
    def crash(self, memory: int) -> None:
        self.start(memory)
        tree = self.checkpoints.load_newest()
        assert (tree is None) == (not self.saved) and (tree is None or tree["round"] == self.round)
        kept, staged = self.saved[-1] if self.saved else ({}, {})
        self.kept, self.staged = dict(kept), dict(staged)

    @rule(memory=MEMORY, at=st.floats(0, 0.999))
    @precondition(lambda self: len(self.saved) == 2)
    def crash_and_damage(self, memory: int, at: float) -> None:
        path = self.folder / f"round-{self.round:06}.ckpt"
        path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])
        self.saved.pop()
        self.round -= 1
        self.crash(memory)

    @invariant()
    def same_state(self) -> None:
        for client in CLIENTS:
            encoded, stamp = self.store.encoded(client), self.store.stamp(client)
            assert encoded == self.kept.get(client) and (stamp is None) == (encoded is None)
            if stamp is not None and encoded is not None:
                assert self.stamps.setdefault((stamp, client), encoded) == encoded
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
    assert store.encoded("a") is None and store.stamp("a") is None
    store.commit()
    first = store.stamp("a")
    assert store.get("a").models["model"]["w"].tolist() == [1.0] * 100 and first is not None
    store.stage("a", private(2, 100).encode())
    store.discard_client("a")
    store.stage("b", private(3, 1))
    store.discard()
    store.commit()
    assert (
        store.stamp("a") == first
        and store.encoded("a") == private(1, 100).encode()
        and store.encoded("b") is None
    )
    store.stage("a", private(2, 100))
    store.commit()
    assert store.stamp("a") != first and store.get("a").state == {"n": 2}
    store.stage("a", PrivateState())
    store.commit()
    assert store.stamp("a") is None and store.get("a") == PrivateState() and store.cached_bytes == 0
    with pytest.raises(ValueError, match="store: must have a folder"):
        Checkpoints(store, pytest.fail)


def test_partial_commit_keeps_other_clients_staged() -> None:
    store = StateStore(memory=0)
    store.stage("a", private(1, 10))
    store.stage("b", private(2, 10))

    store.commit(["a", "c"])

    assert store.encoded("a") == private(1, 10).encode()
    assert store.encoded("b") is None
    assert set(store.staged_locations()) == {"b"}


def test_discard_keeps_committed_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Include state in no checkpoint yet, and state that a failed checkpoint has moved."""
    store = StateStore(tmp_path, 0)
    checkpoints = Checkpoints(store, pytest.fail)
    store.stage("a", private(1, 700))
    store.commit()
    before = store.open_segment.path.stat().st_size
    store.stage("b", private(2, 700))
    assert store.open_segment.path.stat().st_size > before
    store.discard()
    assert store.open_segment.path.stat().st_size == before
    assert store.get("a").state == {"n": 1} and store.encoded("b") is None
    # The state of client a is less than a quarter of the file.
    checkpoints.save(1, {"server": torch.zeros(5000)})
    with monkeypatch.context() as patch:
        patch.setattr(OpenSegment, "seal", lambda *rest: rest.nothing)
        with pytest.raises(AttributeError):
            checkpoints.save(2, {})
    store.stage("b", private(3, 700))
    store.discard()
    store.stage("b", private(4, 700))
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
    """Train 10 of 500 clients: write their states, and 100 bytes per client for the index."""
    checkpoints, sizes = Checkpoints(StateStore(tmp_path, 0), pytest.fail), {}
    blob = len(private(0, 10_000).encode())
    for round_idx, cohort in enumerate((500, 10, 20, 10)):
        for i in range(cohort):
            checkpoints.store.stage(f"site_{i}", private(round_idx, 10_000))
        checkpoints.store.commit()
        sizes[round_idx] = checkpoints.save(round_idx, {}).stat().st_size
    for round_idx, cohort in enumerate((500, 10, 20, 10)):
        assert cohort * blob < sizes[round_idx] < cohort * (blob + 10) + 100 * 500


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Read, stage, commit and restore 60 clients of 400 kB with a limit of 4 MB."""
    bound, size = 4_000_000, 100_000
    checkpoints = Checkpoints(StateStore(tmp_path, bound), pytest.fail)
    tracemalloc.start()
    for round_idx in range(3):
        for i in range(60):
            checkpoints.store.get(f"site_{i}")
            checkpoints.store.stage(f"site_{i}", private(round_idx, size))
            assert checkpoints.store.cached_bytes <= bound
        checkpoints.store.commit()
        checkpoints.save(round_idx, {})
    again = Checkpoints(StateStore(tmp_path, bound), pytest.fail)
    again.load_newest()
    for i in range(60):
        assert again.store.get(f"site_{i}").state == {"n": 2} and again.store.cached_bytes <= bound
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
    read: list[int] = []
    monkeypatch.setattr(
        OpenSegment, "read", lambda self, place: read.append(place.offset) or private(9, 1).encode()
    )
    assert [store.get(f"site_{i}").state["n"] for i in (1, 3, 4)] == [1, 3, 4] and not read
    assert store.get("site_2").state["n"] == 9 and len(read) == 1


@each_case("server", [1, 20_000])
def test_compaction_removes_files_and_keeps_live_state(tmp_path: Path, server: int) -> None:
    checkpoints, rng, truth = (
        Checkpoints(StateStore(tmp_path, 0), pytest.fail),
        random.Random(0),
        {},
    )
    for round_idx in range(60):
        for client in rng.sample(range(40), 40 if round_idx == 0 else 3):
            truth[f"site_{client}"] = private(100 * round_idx + client, 1000).encode()
            checkpoints.store.stage(f"site_{client}", truth[f"site_{client}"])
        checkpoints.store.commit()
        checkpoints.save(round_idx, {"server": torch.zeros(server)})
        files = list(tmp_path.iterdir())
        live, size = sum(map(len, truth.values())), sum(f.stat().st_size for f in files)
        newest = 2 * (4 * server + 40 * 200 + 10_000) + 3 * len(truth["site_0"])
        assert size < COMPACT * live + live + newest
        assert {c: checkpoints.store.encoded(c) for c in truth} == truth
    again = Checkpoints(StateStore(tmp_path, 0), pytest.fail)
    again.load_newest()
    assert {c: again.store.encoded(c) for c in truth} == truth
    assert not (tmp_path / "round-000000.ckpt").exists() and len(files) < 25
