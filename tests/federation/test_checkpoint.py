"""Checkpoints: atomic writes, two files kept, incremental content, and detection of damage."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from hetero_fl.federation import checkpoint
from hetero_fl.federation.checkpoint import Checkpoints, read_checkpoint
from hetero_fl.federation.state_store import PrivateState, StateStore
from hetero_fl.utils.errors import RunFailedError
from hetero_fl.utils.serialization import CodecError
from tests.support.federations import MIXED, config, rounds_of, same_bits, state_of


def checkpoints_in(
    folder: Path, log: Callable[[str], object] = pytest.fail, memory: int = 1 << 20
) -> Checkpoints:
    return Checkpoints(StateStore(folder, memory), log)


def files(folder: Path) -> list[str]:
    return [p.name for p in sorted(folder.iterdir())]


def test_two_checkpoints_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    for i in range(5):
        checkpoints.save(i, {"round": i, "t": torch.full((3,), float(i))})
    assert files(tmp_path) == ["round-000003.ckpt", "round-000004.ckpt"]
    newest = checkpoints.load_newest()
    assert newest is not None and newest["round"] == 4 and newest["t"].tolist() == [4, 4, 4]


def test_full_participation_needs_two_complete_files(
    tmp_path: Path,
) -> None:
    rounds = rounds_of(
        config("hybrid", MIXED, algorithm__heads="keep"), num_rounds=0, store=StateStore(tmp_path)
    )
    checkpoints = Checkpoints(rounds.store, pytest.fail)
    for i in (1, 2, 3):
        rounds.run_round()
        path = checkpoints.save(i, {"run": rounds.state_dict()})
        assert {p.segment.path for p in read_checkpoint(path).locations.values()} == {path}
    assert files(tmp_path) == ["round-000002.ckpt", "round-000003.ckpt"]


def test_damaged_checkpoint_is_detected_and_previous_used(tmp_path: Path) -> None:
    messages: list[str] = []
    rounds = rounds_of(
        config("hybrid", MIXED, algorithm__heads="keep"), num_rounds=1, store=StateStore(tmp_path)
    )
    checkpoints = Checkpoints(rounds.store, messages.append)
    checkpoints.save(1, {"run": rounds.state_dict()})
    rounds.run_round()
    path = checkpoints.save(2, {"run": rounds.state_dict()})
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
            assert newest is not None and newest["run"]["completed"] == 1
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


SETTINGS: list[dict[str, Any]] = [
    {"name": "fedgen", "latent_weight": 0.5, "decay": 0.9},
    {"name": "fedmd", "proxy_rows": 20, "teacher": "entropy"},
    {
        "name": "fedmd",
        "initial_phase": True,
        "initial_public_epochs": 2,
        "initial_private_epochs": 2,
    },
    {"name": "kt_pfl", "initial_phase": True},
    {"name": "hybrid", "proxy_rows": 20},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_resumed_run_equals_uninterrupted_run(settings: dict[str, Any], tmp_path: Path) -> None:
    source = config(
        settings["name"],
        MIXED,
        clients=4,
        clients__per_round=3,
        algorithm=settings,
        rounds=4,
        data__proxy__labels=True,
    )
    plain = rounds_of(source)
    first = rounds_of(source, num_rounds=2, store=StateStore(tmp_path))
    Checkpoints(first.store, pytest.fail).save(2, {"run": first.state_dict()})
    again = rounds_of(source, num_rounds=0, store=StateStore(tmp_path))
    saved = Checkpoints(again.store, pytest.fail).load_newest()
    again.load_state_dict(saved["run"])
    for _ in range(2):
        again.run_round()
    assert state_of(again) == state_of(plain)
    assert again.traffic == plain.traffic
