"""Checkpoints: atomic, two kept, and a single damaged byte is always noticed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hetero_fl.codec import CodecError
from hetero_fl.errors import RunFailed
from hetero_fl.runtime.checkpoint import Checkpoints, read_checkpoint
from tests.small import MIXED, config, rounds_of, same_bits


def test_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, pytest.fail)
    for i in range(5):
        checkpoints.save(i, {"round": i, "t": torch.full((3,), float(i))})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["round-000003.ckpt", "round-000004.ckpt"]
    newest = checkpoints.newest()
    assert newest is not None and newest["round"] == 4 and newest["t"].tolist() == [4, 4, 4]


def test_any_damaged_byte_and_any_cut_is_noticed_and_the_one_before_is_used(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    rounds = rounds_of(config("hybrid", MIXED))
    checkpoints.save(1, {"run": rounds.tree()})
    path = checkpoints.save(2, {"run": rounds.tree()})
    whole, rng = path.read_bytes(), random.Random(1)
    for i in range(200):
        at = rng.randrange(len(whole)) if i > 60 else i  # every byte of the head, then anywhere
        damaged = (
            whole[:at] if i % 3 == 0 else whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        )
        path.write_bytes(damaged)
        with pytest.raises(CodecError):
            read_checkpoint(path)
        if i % 20 == 0:
            said.clear()
            assert checkpoints.newest() is not None
            assert len(said) == 1 and path.name in said[0] and "damaged" in said[0]


def test_none_is_none_and_none_whole_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    assert checkpoints.newest() is None and not said
    for i in (1, 2):
        checkpoints.save(i, {}).write_bytes(b"")
    with pytest.raises(RunFailed, match="no whole checkpoint is left; start anew with another --out"):
        checkpoints.newest()
    newer, older = said
    assert newer.startswith("round-000002.ckpt is damaged") and newer.endswith("; using the one before it")
    assert older.startswith("round-000001.ckpt is damaged") and "before" not in older


@pytest.mark.parametrize("method", ["fedavg", "fedmd", "fd", "feddf", "hybrid", "ensemble"])
def test_a_restored_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    source = config(method, MIXED, clients=4, rounds=4, clients__per_round=2, server={"model": "linear"})
    straight = rounds_of(source)
    first = rounds_of(source, held=2)
    first.evaluate()  # reading a model must leave no trace
    checkpoints = Checkpoints(tmp_path, pytest.fail)
    checkpoints.save(2, first.tree())
    tree = checkpoints.newest()
    assert tree is not None
    again = rounds_of(source, held=0)
    again.restore(tree)
    assert again.round()["cohort"] == straight.cohort(2)
    again.round()
    for slot in straight.server.models:
        assert same_bits(straight.server.models[slot], again.server.models[slot])
    for id in straight.federation.cards:
        kept, other = straight.store.get(id).models, again.store.get(id).models
        assert kept.keys() == other.keys() and all(same_bits(kept[s], other[s]) for s in kept)
